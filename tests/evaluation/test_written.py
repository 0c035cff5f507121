"""Which of what a model samples is taken for a question, and which rows are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import ARCHITECTURES, make_model
from support.learned import make_tokenizer
from support.pico import CHAT
from support.pico import make_tokenizer as make_chat_tokenizer

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.errors import ProxyError
from sage_hub.evaluation import written
from sage_hub.evaluation.written import far_more_lost, repeats
from sage_hub.model.blocks import open_blocks
from sage_hub.model.weights import open_weights
from sage_hub.rows.encoding import Encoder
from sage_hub.rows.prompts import Chat
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


def questions(
    encoder: Encoder, sampled: Sequence[str], count: int, patch: pytest.MonkeyPatch
) -> list[str]:
    """What is made of `sampled`, a text each, the same in every round."""
    prompts: list[list[int]] = []

    def generate(model: Any, tokenizer: Any, given: Any, *_: Any) -> Iterator[list[int]]:
        prompts.extend(map(list, given))
        for text in sampled:
            yield tokenizer(text, add_special_tokens=False)["input_ids"]

    patch.setattr(written, "generate", generate)
    patch.setattr(written, "encoder_of", lambda *_: encoder)
    patch.setattr(written, "end_tokens", lambda *_: [])
    patch.setattr(written, "answer", lambda *args, **_: ["fact1"] * len(args[2]))
    nothing: Any = SimpleNamespace()
    rows = written.write_rows(nothing, nothing, count, Settings(), Run())
    assert all(row["answer"] == "fact1" for row in rows)
    assert len(rows) <= count
    return sorted(row["question"] for row in rows)


def test_plain_questions_end_with_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(make_tokenizer(), None, 64)
    sampled = [
        "about thing1 thing2 ? Answer : fact1",  # whole, and more
        "ABOUT thing1 thing2 ?",  # unknown words
        "about thing3",  # no end
        "?",  # too short
        "about thing1 thing2 " * 9 + "?",  # goes round in circles
    ]
    found = questions(encoder, sampled, 100, monkeypatch)
    whole = [f"{word} about thing1 thing2 ?" for word in written.WORDS]
    assert [q for q in found if "<unk>" not in q] == sorted(whole)
    assert len(found) == len(set(found))


def test_a_chat_model_is_given_the_opening_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_chat_tokenizer(CHAT)
    chat = Chat(tokenizer, date(2026, 11, 28))
    assert chat.turn == ("<user> ", " <end> ")
    encoder = Encoder(tokenizer, chat, 64)
    sampled = [
        "w1 w2 w3 w4 <end> <assistant> w5",
        "w5 w6 w7 w8",  # shorter than what is sampled, so an end token was there
        "w1 w2 <user> w3 w4 <end>",  # another turn begins
        " ".join(f"w{n % 50}" for n in range(written.QUESTION_TOKENS)),  # no end
    ]
    assert questions(encoder, sampled, 100, monkeypatch) == ["w1 w2 w3 w4", "w5 w6 w7 w8"]


def test_a_template_that_opens_no_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_chat_tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}")
    encoder = Encoder(tokenizer, Chat(tokenizer, date(2026, 11, 28)), 64)
    with pytest.raises(ProxyError, match="writes nothing before what a user says"):
        questions(encoder, [], 1, monkeypatch)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=40), st.integers(1, 3))
def test_only_what_lost_far_more_is_left_out(lost: list[float], some: int) -> None:
    marked = far_more_lost([*lost, *[1e6] * some], 6)
    assert all(marked[len(lost) :])
    assert sum(marked) <= len(marked) / 2
    assert not any(far_more_lost([0.5] * 9, 6))


@pytest.mark.parametrize(
    "text, circles",
    [
        ("", False),
        ("one two", False),
        ("one two three one two three", False),
        ("one two three " * 5, True),
        ("the same " * 20, True),
        ("it is said that it is said by some and that it is said by others", False),
    ],
)
def test_a_text_that_goes_round_in_circles(text: str, circles: bool) -> None:
    assert repeats(text) is circles


def test_only_likely_tokens_are_sampled() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.16, 0.03, 0.01]]).log().repeat(3, 1)
    kept = torch.isfinite(written._nucleus(logits))
    assert kept.tolist() == [[True, True, True, False, False]] * 3
    one = torch.tensor([[9.0, 0.0, 0.0]])
    assert torch.isfinite(written._nucleus(one)).sum() == 1


def test_a_broken_model_is_sampled_as_well() -> None:
    for broken in (float("nan"), float("inf")):
        logits = torch.full((2, 5), broken)
        assert torch.isfinite(written._nucleus(logits).softmax(-1)).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_asked(name: str, tmp_path: Path) -> None:
    """Its weights are random, so what it says is worth nothing; but it is asked, and says it."""
    make_model(name).save_pretrained(tmp_path)
    make_chat_tokenizer().save_pretrained(tmp_path)  # of as many tokens as the models have
    base = open_checkpoint(str(tmp_path))
    with (
        open_weights(base) as weights,
        open_blocks(base, weights, "cpu", torch.float32) as model,
        model.whole(weights) as whole,
    ):
        assert isinstance(written.write_rows(whole, base, 3, Settings(), Run()), list)
