"""From rows to batches: where the answer begins, which rows are taken, and what is masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.pico import CHAT, WORDS, make_tokenizer
from transformers import PreTrainedTokenizerBase

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.errors import NotFoundError, ProxyError
from sage_hub.rows.encoding import (
    Batch,
    Encoded,
    Encoder,
    batches,
    encode,
    load_tokenizer,
    row_limit,
    take_tokens,
)
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy, Row

PLAIN, TEMPLATED = make_tokenizer(), make_tokenizer(CHAT)
phrases = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


def row_of(**record: object) -> Row:
    return parse_rows([record], "set")[0]


def spoken(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What comes before the answer and the answer, in words."""
    parts = encoded.ids[: encoded.answer_start], encoded.ids[encoded.answer_start :]
    before, answer = (" ".join(tokenizer.convert_ids_to_tokens(list(part))) for part in parts)
    return before, answer


def encode_one(row: Row, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> Encoded:
    (encoded,) = encode(Proxy("set", (row,)), tokenizer, chat_template=chat, max_length=100)
    return encoded


# Where the answer begins


@given(phrases, phrases)
def test_the_answer_of_a_plain_row_begins_behind_its_prompt(question: str, answer: str) -> None:
    for row in (
        row_of(question=question, answer=answer),
        row_of(prompt=f"Question: {question}\nAnswer:", completion=f" {answer}"),
    ):
        before, after = spoken(encode_one(row, PLAIN), PLAIN)
        assert before == f"Question : {question} Answer :"
        assert after == answer


@given(phrases, phrases)
def test_the_answer_of_a_chat_row_begins_behind_the_generation_prompt(
    question: str, answer: str
) -> None:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for row in (row_of(question=question, answer=answer), row_of(messages=chat)):
        before, after = spoken(encode_one(row, TEMPLATED), TEMPLATED)
        assert before == f"<user> {question} <end> <assistant>"
        assert after == f"{answer} <end>"


def test_only_the_last_turn_is_the_answer() -> None:
    words = ("w1", "w2", "w3", "w4")
    turns = [
        {"role": role, "content": word}
        for role, word in zip(("user", "assistant") * 2, words, strict=True)
    ]
    before, after = spoken(encode_one(row_of(messages=turns), TEMPLATED), TEMPLATED)
    assert before == "<user> w1 <end> <assistant> w2 <end> <user> w3 <end> <assistant>"
    assert after == "w4 <end>"


@pytest.mark.parametrize(
    "tokenizer, chat, templated",
    [(TEMPLATED, True, True), (TEMPLATED, False, False), (PLAIN, True, False)],
)
def test_the_template_is_used_where_there_is_one_and_it_is_wanted(
    tokenizer: PreTrainedTokenizerBase, chat: bool, templated: bool
) -> None:
    before, _ = spoken(encode_one(row_of(question="w1", answer="w2"), tokenizer, chat), tokenizer)
    assert before.startswith("<user>") is templated


@pytest.mark.parametrize("row", [row_of(prompt="w1", completion=" w2"), row_of(text="w1 w2")])
def test_rows_without_turns_are_never_templated(row: Row) -> None:
    assert TEMPLATED.convert_ids_to_tokens(list(encode_one(row, TEMPLATED).ids)) == ["w1", "w2"]


@given(phrases)
def test_a_text_row_is_predicted_from_its_second_token_on(text: str) -> None:
    assert encode_one(row_of(text=text), PLAIN) == Encoded(
        tuple(PLAIN(text)["input_ids"]), answer_start=1, number=1
    )


def test_a_token_across_the_seam_belongs_to_the_answer() -> None:
    # "w1" + "2" is the one word w12, so nothing of the prompt's last token is left.
    before, after = spoken(encode_one(row_of(prompt="w3 w1", completion="2 w4"), PLAIN), PLAIN)
    assert (before, after) == ("w3", "w12 w4")


def test_special_tokens_around_a_text_do_not_move_the_answer() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<user>", "<end>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <end>", special_tokens=list(ids.items())
    )
    encoded = encode_one(row_of(prompt="w1 w2", completion=" w3"), tokenizer)
    assert spoken(encoded, tokenizer) == ("<user> w1 w2", "w3 <end>")


# What cannot be encoded


@given(phrases, phrases, st.integers(1, 20))
def test_a_long_row_is_cut_and_says_so(question: str, answer: str, limit: int) -> None:
    row = row_of(question=question, answer=answer)
    whole, cut = (Encoder(PLAIN, None, length).row(row, "set") for length in (100, limit))
    assert not whole.truncated
    assert Encoder(PLAIN, None, len(whole.ids)).row(row, "set") == whole
    assert cut.ids == whole.ids[:limit]
    assert cut.truncated is (len(whole.ids) > limit)
    assert cut.answer_start == whole.answer_start


def test_a_row_without_tokens_is_refused_by_its_number() -> None:
    proxy = Proxy("facts.jsonl", (Row("", "w1"), Row("", " ")))
    with pytest.raises(ProxyError, match=r"facts\.jsonl, row 2"):
        encode(proxy, PLAIN, chat_template=True, max_length=10)


def test_a_row_that_the_template_refuses_is_named() -> None:
    # As templates do that know no system role, or want user and assistant in turn.
    strict = make_tokenizer("{{ raise_exception('System role not supported') }}")
    proxy = Proxy("facts.jsonl", parse_rows([{"question": "w1", "answer": "w2"}], "facts"))
    with pytest.raises(ProxyError, match=r"facts\.jsonl, row 1.*System role not supported"):
        encode(proxy, strict, chat_template=True, max_length=10)


def test_the_limit_of_a_row_is_the_shorter_of_setting_and_context(pair: Path) -> None:
    checkpoint = open_checkpoint(str(pair / "base"))
    assert row_limit(checkpoint, 2048) == 64
    assert row_limit(checkpoint, 10) == 10


def test_a_checkpoint_without_a_tokenizer_is_explained(pair: Path) -> None:
    assert load_tokenizer(open_checkpoint(str(pair / "base")))("w3")["input_ids"] == [10]
    for file in (pair / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(NotFoundError, match="base has no tokenizer"):
        load_tokenizer(open_checkpoint(str(pair / "base")))


# Which rows are taken


def rows_of(lengths: list[int]) -> list[Encoded]:
    """Rows of these lengths, each with ids of its own."""
    return [
        Encoded(tuple(range(100 * n + 1, 100 * n + 1 + length)), min(2, length))
        for n, length in enumerate(lengths)
    ]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(lengths, st.integers(1, 120), st.integers(0, 5))
def test_the_rows_taken_fit_the_budget_or_are_one(
    row_lengths: list[int], budget: int, seed: int
) -> None:
    rows = rows_of(row_lengths)
    taken = take_tokens(rows, budget, seed)
    total = sum(row_lengths[place] for place in taken)
    assert taken == sorted(set(taken))
    assert taken == take_tokens(rows, budget, seed)
    assert taken
    assert len(taken) == 1 or total <= budget
    if sum(row_lengths) <= budget:
        assert taken == list(range(len(rows)))
    else:  # as many as fit in their random order: the next one would have been too much
        assert total + max(row_lengths) > budget


def test_the_seed_chooses_the_rows() -> None:
    rows = rows_of([1] * 50)
    choices = {tuple(take_tokens(rows, 10, seed)) for seed in range(20)}
    assert all(len(choice) == 10 for choice in choices)
    assert len(choices) == 20


# Batches


@given(lengths, st.integers(1, 5))
def test_batches_hold_every_row_once_and_mask_the_rest(
    row_lengths: list[int], batch_size: int
) -> None:
    rows = rows_of(row_lengths)
    made = list(batches(rows, batch_size))
    assert sorted(place for batch in made for place in batch.rows) == list(range(len(rows)))
    for batch in made:
        assert 1 <= len(batch.rows) <= batch_size
        assert batch.ids.shape == batch.mask.shape == batch.answer.shape
        for line, place in enumerate(batch.rows):
            assert batch.ids[line][batch.mask[line].bool()].tolist() == list(rows[place].ids)
            answer = rows[place].ids[rows[place].answer_start :]
            assert batch.ids[line][batch.answer[line]].tolist() == list(answer)


@given(lengths, st.integers(1, 5))
def test_batches_go_from_long_to_short_without_waste(
    row_lengths: list[int], batch_size: int
) -> None:
    made = list(batches(rows_of(row_lengths), batch_size))
    order = [row_lengths[place] for batch in made for place in batch.rows]
    assert order == sorted(row_lengths, reverse=True)
    assert [batch.ids.shape[1] for batch in made] == order[::batch_size]


def test_padding_is_on_the_right() -> None:
    (batch,) = batches([Encoded((5, 6), 1), Encoded((7, 8, 9), 2)], batch_size=2)
    assert isinstance(batch, Batch)
    assert batch.rows == (1, 0)
    assert torch.equal(batch.mask, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert torch.equal(batch.answer, torch.tensor([[0, 0, 1], [0, 1, 0]]).bool())
    assert batch.ids.tolist() == [[7, 8, 9], [5, 6, 0]]


def test_an_answer_that_was_cut_away_has_no_loss() -> None:
    (batch,) = batches([Encoded((5, 6, 7), answer_start=9, truncated=True)], batch_size=1)
    assert not batch.answer.any()
