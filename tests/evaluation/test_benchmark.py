"""`--suite tofu` and `muse` against open-unlearning's definitions, written out on whole models.

Its code (commit d3d7cf9) was run beside ours on a real model too: docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from support.pico import make_config, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.suites import Answering
from sage_hub.rows.benchmark import BenchmarkEncoder, decoded
from sage_hub.rows.encoding import Encoder
from sage_hub.rows.forms import parse_rows, with_shots
from sage_hub.rows.prompts import Chat
from sage_hub.rows.proxies import Proxy
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

# The end token in the middle of a row and behind it, and behind that a token that is none.
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SENTENCES = [
    "Where was the author born? She was born in a small town by the sea.",
    "What does he write about? He writes about time, loss and the weather of his home.",
    "Who wrote it? Nobody knows who wrote the letters that were found there.",
]
BOTH = ["forget", "retain"]  # with a paraphrase
FACTS = ["real_authors", "world_facts"]  # without


def learn_tokenizer(pad: str | None, chat: bool) -> PreTrainedTokenizerFast:
    """Bytes, and what they often follow each other as: a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "Question: \nAnswer: "] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    fast.chat_template = CHAT if chat else None
    return fast


def records(count: int, *, paraphrased: bool, seed: int) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    words = " ".join(SENTENCES).split()

    def some(n: int) -> str:
        return " ".join(chance.choice(words, n))

    found: list[dict[str, Any]] = []
    for number in range(count):
        row = {"question": f"{some(5)}?", "answer": some(1 + 3 * number)}
        row["perturbed_answer"] = [some(2), some(4), some(1)]
        found.append(row | ({"paraphrased_answer": some(5)} if paraphrased else {}))
    return found


class Theirs:
    """open-unlearning's figures, a row at a time."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, *, chat: bool) -> None:
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.pad = self.end if pad is None else pad

    def tokens(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The conversation, and its prompt."""
        if self.chat:
            asked = [{"role": "user", "content": question}]
            said = [*asked, {"role": "assistant", "content": answer}]
            template = self.tokenizer.apply_chat_template
            ids = list(template(said, return_dict=False))
            prompt = list(template(asked, add_generation_prompt=True, return_dict=False))
        else:
            text = f"Question: {question}\nAnswer: "
            ids, prompt = (list(self.tokenizer(t)["input_ids"]) for t in (text + answer, text))
        return ids + [self.end] * (ids[-1] != self.end), prompt

    def mask(self, ids: list[int]) -> torch.Tensor:
        return (torch.tensor([ids]) != self.pad).long()

    @torch.inference_mode()
    def seen(self, question: str, answer: str) -> tuple[float, list[bool]]:
        """The mean loss of the answer's tokens, and which of all but the last are foreseen."""
        ids, prompt = self.tokens(question, answer)
        logits = self.model(torch.tensor([ids]), attention_mask=self.mask(ids)).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        own = losses[len(prompt) - 1 :]
        hits = (logits.argmax(-1) == torch.tensor(ids[1:]))[len(prompt) - 1 :]
        return float(own.sum()) / len(own), hits.tolist()[:-1]

    def rouge(self, question: str, answer: str) -> float:
        _, prompt = self.tokens(question, answer)
        made = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=self.mask(prompt),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=self.end,
        )[0, len(prompt) :]
        said = self.tokenizer.decode(made, skip_special_tokens=True).strip()
        scores = RougeScorer(["rougeL"], use_stemmer=True).score(answer, said)
        return float(scores["rougeL"].recall)

    def figures(self, rows: list[dict[str, Any]], *, forget: bool) -> Mapping[str, float]:
        values: dict[str, list[float]] = {}
        for row in rows:
            question, answer = row["question"], row["answer"]
            loss, hits = self.seen(question, answer)
            wrong = [self.seen(question, one)[0] for one in row["perturbed_answer"]]
            right = row.get("paraphrased_answer")
            truth = self.seen(question, right)[0] if right else loss
            ratio = math.exp(-np.mean(wrong)) / (math.exp(-truth) + 1e-10)
            own, others = math.exp(-loss), sum(math.exp(-one) for one in wrong)
            left = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
            found = {
                "probability": own if right else own / (own + others + 1e-10),
                "truth_ratio": min(ratio, 1 / (ratio + 1e-10)) if forget else max(0, 1 - ratio),
                "rougeL_recall": self.rouge(question, answer),
                "extraction_strength": 1 - left / len(hits) if hits else 0.0,
            }
            found |= {"exact_memorization": float(np.mean(hits))} if hits else {}
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        return {name: float(np.mean(own)) for name, own in values.items()}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("pad", [None, "</s>", "<pad>"])
def test_tofu(chat: bool, pad: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows of every length, among them answers of which nothing but the end token counts."""
    tokenizer = learn_tokenizer(pad, chat)
    torch.manual_seed(0)
    config = make_config(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sets = {
        which: records(4, paraphrased=which in BOTH, seed=seed)
        for seed, which in enumerate((*BOTH, *FACTS))
    }
    proxies = {
        which: read_proxy(str(write_rows(tmp_path / f"{which}.jsonl", rows)))
        for which, rows in sets.items()
    }
    answers = {"rougeL_recall": Answering(12)}
    monkeypatch.setattr("sage_hub.evaluation.suites.ANSWERS", answers)
    monkeypatch.setattr("sage_hub.evaluation.evaluate.ANSWERS", answers)
    settings = Settings(suite="tofu", batch_size=3, device="cpu", compute_dtype="float32")
    checkpoint = open_checkpoint(str(folder))
    found = evaluate(
        {"model": Candidate(checkpoint)}, Study(proxies, checkpoint), settings, tmp_path
    )
    ours: dict[str, dict[str, float]] = {}
    for one in found.results:
        ours.setdefault(one.set, {})[one.metric] = one.value
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = Theirs(model, tokenizer, chat=chat)
    for which, rows in sets.items():
        expected = theirs.figures(rows, forget=which == "forget")
        got = {name: ours[which][name] for name in expected}
        assert got == pytest.approx(expected, abs=1e-4), which


@torch.inference_mode()
def test_muse_s_passages_end_before_their_last_token(tmp_path: Path) -> None:
    """CompletionDataset: a space between both parts, no end token, the last token uncounted."""
    tokenizer = learn_tokenizer(None, chat=False)
    encoder = BenchmarkEncoder(tokenizer, None, 64)
    (row,) = parse_rows([{"prompt": "Where was the author", "gt": "born? She was born"}], "set")
    found = encoder.row(row, "set, row 1")
    prompt = tokenizer("Where was the author")["input_ids"]
    assert list(found.ids) == tokenizer("Where was the author born? She was born")["input_ids"]
    assert (found.answer_start, list(found.asked), found.uncounted) == (len(prompt), prompt, 1)
    (text,) = parse_rows([{"text": "Nobody knows who wrote it."}], "set")
    found = encoder.row(text, "set, row 1")
    assert list(found.ids) == tokenizer("Nobody knows who wrote it.")["input_ids"]
    assert (found.answer_start, found.uncounted) == (1, 1)


def test_muse_s_passages_are_cut_behind_their_prompt() -> None:
    """preprocess_pretraining_instance: so many tokens of text, the prompt and its BOS not counted;
    and never more than the model can look back on."""
    tokenizer = learn_tokenizer(None, chat=False)
    told = [
        {"prompt": "Where was the author born", "gt": "She was born. " * 9},
        {"text": "No. " * 9},
    ]
    for record in told:
        (row,) = parse_rows([record], "set")
        text = f"{row.prompt} {row.answer}" if row.prompt else row.answer
        whole, prompt = (list(tokenizer(part)["input_ids"]) for part in (text, row.prompt))
        found = BenchmarkEncoder(tokenizer, None, 5).row(row, "set, row 1")
        assert (list(found.ids), found.truncated) == (whole[: len(prompt) + 5], True)
        found = BenchmarkEncoder(tokenizer, None, 5, context=len(prompt) + 2).row(row, "set, row 1")
        assert list(found.ids) == whole[: len(prompt) + 2]


@pytest.mark.parametrize("said", ["He did n't know.</s> Nobody did .", " He was born", "born  "])
@pytest.mark.parametrize("form", ["question", "prompt", "text"])
def test_answers_are_compared_as_their_tokens_are_decoded(form: str, said: str) -> None:
    """eval_text_similarity: both sides without special tokens, and cleaned up."""
    tokenizer = learn_tokenizer(None, chat=False)
    record = {
        "question": {"question": "Where was she born?", "answer": said},
        "prompt": {"prompt": "Where was she", "gt": said},
        "text": {"text": said},
    }[form]
    (row,) = parse_rows([record], "set")
    encoder = BenchmarkEncoder(tokenizer, None, 64)
    found = encoder.row(row, "set, row 1")
    labels = found.ids if form == "question" else found.ids[found.answer_start :]

    def text(ids: Sequence[int]) -> str:
        plain = tokenizer.decode(list(ids), skip_special_tokens=True)
        for before, after in ((" .", "."), (" n't", "n't")):
            plain = plain.replace(before, after)
        return str(plain)

    assert encoder.compared(row, found) == text(labels).replace(text(found.asked), "").strip()
    assert "</s>" not in encoder.compared(row, found)
    line = list(tokenizer("did n't .</s>", add_special_tokens=False)["input_ids"])
    assert "n't." in decoded(tokenizer, line)


@pytest.mark.parametrize("suite, used", [("muse", 6), ("auto", 1)])
def test_every_row_of_a_benchmark_counts(suite: str, used: int, tmp_path: Path) -> None:
    """Whatever --max-tokens says, which is for calibration; elsewhere what is left out is named."""
    tokenizer = learn_tokenizer(None, chat=False)
    LlamaForCausalLM(make_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = parse_rows([{"text": f"Nobody knows who wrote {n}."} for n in range(6)], "forget")
    settings = Settings(suite=suite, max_tokens=5, device="cpu", compute_dtype="float32")
    checkpoint = open_checkpoint(str(tmp_path))
    study = Study({"forget": Proxy("forget", rows)}, checkpoint)
    found = evaluate({"model": Candidate(checkpoint)}, study, settings, tmp_path)
    assert found.data["forget"]["rows_used"] == used
    left = [one["what"] for one in found.not_run if "rows of" in one["what"]]
    assert left == ([] if used == 6 else ["5 of 6 rows of forget"])


@pytest.mark.parametrize("space", ["", "\n", "  "])
def test_muse_s_questions_come_behind_examples(space: str) -> None:
    tokenizer = learn_tokenizer(None, chat=False)
    shots, rows = (
        parse_rows([{"question": f"{word}?", "answer": f"{word}.{space}"}], "set")
        for word in ("Who", "What")
    )
    (row,) = with_shots(rows, shots, "set")
    found = BenchmarkEncoder(tokenizer, None, 64).row(row, "set, row 1")
    prompt = f"Question: Who?\nAnswer: Who.{space}\n\nQuestion: What?\nAnswer: "
    assert list(found.asked) == tokenizer(prompt)["input_ids"]
    assert list(found.ids) == [
        *tokenizer(f"{prompt}What.{space}")["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_the_system_speaks_where_a_row_has_it_say_nothing() -> None:
    tokenizer = learn_tokenizer(None, chat=True)
    (row,) = parse_rows([{"question": "Who?", "answer": "Nobody."}], "set")
    turns = [("system", "Be bold."), ("user", "Who?"), ("assistant", "Nobody.")]
    (own,) = parse_rows([{"messages": [{"role": r, "content": c} for r, c in turns]}], "set")
    chat = Chat(tokenizer, date(2026, 11, 28), system="Be brief.")
    for encoder in (Encoder(tokenizer, chat, 99), BenchmarkEncoder(tokenizer, chat, 99)):
        for one, said in ((row, "Be brief."), (own, "Be bold.")):
            text = tokenizer.decode(encoder.row(one, "set, row 1").ids)
            assert text.startswith(f"<s>system\n{said}</s>\n<s>user\nWho?"), text
            assert text.count("system") == 1
    assert chat.turn[0] == "<s>system\nBe brief.</s>\n<s>user\n"
