"""Evaluation against independent computations, on models and rows made for it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pico import make_pair, make_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.cli.display import evaluation_text
from sage_hub.cli.main import main
from sage_hub.cli.terminal import plain
from sage_hub.commands.eval import evaluate_models
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.relearning import choose_taught, relearn
from sage_hub.evaluation.robustness import quantized, round_to_nearest
from sage_hub.evaluation.scoring import Scored, answer, score
from sage_hub.evaluation.suites import Answering
from sage_hub.model.blocks import open_blocks
from sage_hub.model.weights import open_weights
from sage_hub.rows.encoding import Encoded
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import SETS, Settings


def score_all(folder: Path, rows: list[Encoded], scratch: Path, **how: Any) -> list[Scored]:
    checkpoint = open_checkpoint(str(folder))
    with (
        open_weights(checkpoint) as weights,
        open_blocks(checkpoint, weights, "cpu") as model,
    ):
        settings = Settings(**{"batch_size": 4, "memory": 4.0, **how})
        return score(model, weights, rows, settings, scratch)


def rows_of(count: int, seed: int = 0) -> list[Encoded]:
    chance = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (1,), generator=chance))
        ids = torch.randint(0, 70, (length,), generator=chance).tolist()
        rows.append(Encoded(tuple(ids), int(torch.randint(1, length, (1,), generator=chance))))
    return rows


@pytest.fixture(scope="module")
def float_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    make_pair(folder, dtype=torch.float32)
    return folder


@pytest.mark.parametrize("size", [1, 3, 8])
@torch.inference_mode()
def test_scores_are_those_of_a_loop_over_the_model(
    size: int, float_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sage_hub.evaluation.scoring.LOGITS", 72 * 5
    )  # five tokens through the head at once
    letters = [Encoded((4, 8, 9, letter), 3) for letter in (10, 11, 12)]  # of one question
    rows = [*rows_of(13), *letters, Encoded((1, 2, 3), 3)]  # the last one's answer was cut away
    found = score_all(float_pair / "base", rows, tmp_path, batch_size=size)
    model = AutoModelForCausalLM.from_pretrained(float_pair / "base").double()
    for row, one in zip(rows, found, strict=True):
        ids = torch.tensor([row.ids])
        logprobs = model(ids).logits[0].log_softmax(-1)
        expected = [
            float(logprobs[t - 1, row.ids[t]]) for t in range(row.answer_start, len(row.ids))
        ]
        hits = [
            int(logprobs[t - 1].argmax()) == row.ids[t]
            for t in range(row.answer_start, len(row.ids))
        ]
        assert one.logprobs == pytest.approx(expected, abs=2e-5)
        assert one.hits.tolist() == hits
    assert math.isnan(found[-1].loss)


def test_greedy_answers_do_not_depend_on_their_neighbours(
    float_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(float_pair / "base"))
    tokenizer = AutoTokenizer.from_pretrained(float_pair / "base")
    rows = rows_of(7)
    monkeypatch.setattr("sage_hub.evaluation.scoring.end_tokens", lambda _: [5])
    with (
        open_weights(checkpoint) as weights,
        open_blocks(checkpoint, weights, "cpu") as model,
        model.whole(weights) as whole,
    ):
        together = answer(whole, checkpoint, rows, Answering(9), batch_size=7)
        alone = [answer(whole, checkpoint, [row], Answering(9), batch_size=1)[0] for row in rows]
        cut = answer(whole, checkpoint, rows, Answering(9, ("w1",)), batch_size=3)
    reference = AutoModelForCausalLM.from_pretrained(float_pair / "base")
    for row, text, single, short in zip(rows, together, alone, cut, strict=True):
        ids = list(row.ids[: row.answer_start])
        new: list[int] = []
        while len(new) < 9:
            token = int(reference(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == 5:
                break
            new.append(token)
        assert text == single == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert short == text.partition("w1")[0].strip()


def test_accuracy_is_that_of_lm_eval(float_pair: Path, tmp_path: Path) -> None:
    config = float_pair / "base" / "tokenizer_config.json"
    changed = json.loads(config.read_text()) | {"eos_token": "<end>"}  # lm-eval takes one
    config.write_text(json.dumps(changed))
    questions = [
        {**row, "choices": [r["answer"] for r in make_rows(4, 50 + n)], "answer": n % 4}
        for n, row in enumerate(make_rows(12, 9))
    ]
    data = write_rows(tmp_path / "choices.jsonl", questions)
    (tmp_path / "pico_choices.yaml").write_text(
        json.dumps(
            {
                "task": "pico_choices",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
                "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    report = evaluate_models(
        [str(float_pair / "base")],
        settings=Settings(heldout=str(data), lm_eval=str(tmp_path / "pico_choices.yaml")),
    )
    values = {(r["set"], r["metric"]): r["value"] for r in report["results"]}
    assert values["heldout", "accuracy"] == pytest.approx(values["pico_choices", "acc"])


def test_beginning_of_text_tokens_are_context_not_answer(float_pair: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from sage_hub.rows.encoding import Encoder
    from sage_hub.rows.forms import parse_rows

    (row,) = parse_rows([{"prompt": "w1 w2", "completion": " w3 w4"}], "rows")
    plain = AutoTokenizer.from_pretrained(float_pair / "base")
    opened = AutoTokenizer.from_pretrained(float_pair / "base")
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 1)]
    )
    for tokenizer, before in ((plain, 2), (opened, 3)):
        found = Encoder(tokenizer, None, 99).row(row, "rows")
        assert (found.answer_start, len(found.ids)) == (before, before + 2)
        (one,) = score_all(float_pair / "base", [found], tmp_path)
        assert one.tokens == 2


# Robustness


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_to_the_nearest_of_its_group(bits: int) -> None:
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    weight[0, :128] = 0
    found = round_to_nearest(weight, bits)
    for start in range(0, 300, 128):
        group, rounded = weight[:, start : start + 128], found[:, start : start + 128]
        step = group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((group - rounded).abs() <= step / 2 + 1e-6).all()
        assert (rounded[0] == 0).all() or start
        for row, size in zip(rounded, step, strict=True):
            assert len(row.unique()) <= 2**bits - 1
            assert size == 0 or torch.allclose(row / size, (row / size).round(), atol=1e-3)


def test_only_linear_layers_are_rounded(float_pair: Path) -> None:
    checkpoint = open_checkpoint(str(float_pair / "base"))
    with open_weights(checkpoint) as weights, open_blocks(checkpoint, weights, "cpu") as model:
        coarse = quantized(weights, model, 4)
        names = set(model.model.state_dict())
        changed = {name for name in names if not torch.equal(coarse(name), weights(name))}
    assert changed == {name for name in names if "_proj." in name}


def test_relearning_brings_back_what_it_teaches_and_leaves_no_trace(
    float_pair: Path, tmp_path: Path
) -> None:
    rows = rows_of(8, seed=3)
    before = score_all(float_pair / "unlearned", rows, tmp_path)
    checkpoint: Checkpoint = open_checkpoint(str(float_pair / "unlearned"))
    with (
        open_weights(checkpoint) as weights,
        open_blocks(checkpoint, weights, "cpu") as model,
    ):
        scored = partial(score, rows=rows, settings=Settings(), scratch=tmp_path)
        with model.whole(weights) as whole:
            for _ in relearn(whole, rows, seed=0, stops=[4]):
                after = scored(whole, weights)
        again = scored(model, weights)
    assert sum(one.loss for one in after) < sum(one.loss for one in before)
    for one, other in zip(before, again, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_what_waits_on_disk_changes_no_figure(pair: Path, tmp_path: Path) -> None:
    long = [{**row, "answer": " ".join([row["answer"]] * 3)} for row in make_rows(60, seed=9)]
    write_rows(pair / "retain.jsonl", long)
    sets = {name: read_proxy(str(pair / f"{name}.jsonl")) for name in SETS}
    base = open_checkpoint(str(pair / "base"))
    found = []
    for memory in (8.0, 1e-6):
        settings = Settings(generate_rows=0, robustness=True, memory=memory, device="cpu")
        made = evaluate({"base": Candidate(base)}, Study(sets, base), settings, tmp_path)
        kept = [one for one in made.results if "relearned" not in (one.condition or "")]
        found.append([(one.set, one.metric, one.condition, one.value) for one in kept])
    assert {condition for _, _, condition, _ in found[0]} >= {None, "int8", "int4"}
    assert found[0] == found[1]


@pytest.mark.parametrize("rows, taught", [(0, 0), (1, 0), (10, 5), (40, 20), (400, 20)])
def test_half_of_the_rows_are_taught_at_most(rows: int, taught: int) -> None:
    chosen = choose_taught(rows, 0)
    assert len(set(chosen)) == taught
    assert all(0 <= place < rows for place in chosen)


# The command


def test_eval_compares_models_and_says_what_it_did_not_run(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perturbed = [
        {
            **row,
            "paraphrased_answer": "w1 w2",
            "perturbed_answer": ["w3", "w4 w5"],
            "paraphrased_question": "w6 w7",
        }
        for row in make_rows(12, 77)
    ]
    forget = write_rows(pair / "perturbed.jsonl", perturbed)
    texts = write_rows(pair / "texts.jsonl", [{"text": f"w{n} w{n + 1} w2"} for n in range(20)])
    models = [str(pair / "base"), str(pair / "unlearned")]
    words = ["eval", *models, "--forget", str(forget), "--unseen", str(texts), "--robustness"]
    words += ["--bystander", f"texts={pair / 'heldout.jsonl'}", "--reference", models[0], "--json"]
    assert main([*words, "--generate-rows", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    results = {(r["model"], r["set"], r["metric"], r["condition"]): r for r in report["results"]}
    own = {(s, m) for model, s, m, condition in results if model == models[1] and not condition}
    assert {
        ("forget", "truth_ratio"),
        ("forget", "forget_quality"),
        ("unseen", "perplexity"),
    } <= own
    assert {("forget", "privleak"), ("forget", "forget_quality_D"), ("texts", "probability")} <= own
    # The reference is the first model here, so that one is what it should be.
    assert results[models[0], "forget", "forget_quality", None]["value"] == 1
    assert results[models[0], "forget", "privleak", None]["value"] == 0
    assert results[models[1], "forget", "rougeL_recall", None]["rows"] == 3
    conditions = {condition for model, _, _, condition in results if model == models[1]}
    curve = {f"relearned_{steps}" for steps in (0, 10, 25, 50, 100)}
    assert conditions == {None, "int8", "int4", "paraphrased", "sampled", "relearned", *curve}
    assert all(gap["other"] == models[0] for gap in report["differences"])
    # The terminal shows each figure beside its change.
    gap = next(g for g in report["differences"] if g["metric"] == "perplexity")
    shown = next(
        line for line in plain(evaluation_text(report)).splitlines() if "perplexity" in line
    )
    assert f"({gap['value']:+.4f} {gap['verdict']})" in shown
    missing = {entry["what"]: entry["reason"] for entry in report["not_run"]}
    assert missing["heldout metrics"] == "no --heldout was given"
    assert missing["relearning on retained rows"] == "there are no retain rows"


def test_eval_takes_a_set(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(pair / "base")]) == 2
    assert "Nothing to evaluate on" in capsys.readouterr().err


def test_what_does_not_fit_is_absent_with_its_reason(pair: Path) -> None:
    report = evaluate_models(
        [str(pair / "base")],
        settings=Settings(forget=str(pair / "forget.jsonl"), memory=0.5, robustness=True),
    )
    reasons = {entry["what"]: entry["reason"] for entry in report["not_run"]}
    for what in ("generated answers", "relearning"):
        assert "--memory allows 500 MB" in reasons[f"{what} of {pair / 'base'}"]
    assert {r["metric"] for r in report["results"]} >= {"probability", "extraction_strength"}
