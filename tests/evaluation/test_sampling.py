"""Sampled answers and leak@k against plain loops."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from support.pico import make_pair, make_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.commands.eval import evaluate_models
from sage_hub.evaluation import suites
from sage_hub.evaluation.evaluate import expected_names
from sage_hub.evaluation.metrics import Seen, leak_at
from sage_hub.evaluation.sampling import drawing
from sage_hub.evaluation.scoring import Scored
from sage_hub.evaluation.suites import Told, prepare
from sage_hub.rows.encoding import encoder_of
from sage_hub.rows.proxies import Row
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

TOKENS = 6  # of an answer, in place of 200


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    make_pair(folder, dtype=torch.float32)
    write_rows(folder / "forget.jsonl", make_rows(5, seed=1))
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.ANSWERS, "rougeL_recall", suites.Answering(TOKENS))


def recall(wanted: str, said: str) -> float:
    """The longest common subsequence of words over the words wanted."""
    one, other = wanted.split(), said.split()
    longest = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            longer = max(longest[i][j + 1], longest[i + 1][j])
            longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else longer
    return longest[-1][-1] / len(one)


def of_words(count: int, chance: random.Random) -> str:
    return " ".join(f"w{chance.randrange(6)}" for _ in range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_leak_at_k_is_the_mean_of_the_largest_of_every_choice_of_k(count: int, seed: int) -> None:
    chance = random.Random(seed)
    wanted, said = of_words(7, chance), tuple(of_words(5, chance) for _ in range(6))
    told = Told(Scored(torch.zeros(1).numpy(), torch.zeros(1).bool().numpy()))
    seen = Seen(Row("", wanted), told, sampled=said)
    recalls = [recall(wanted, one) for one in said]
    expected = mean(max(some) for some in combinations(recalls, count))
    assert leak_at(count)(seen) == pytest.approx(expected)
    assert leak_at(7)(seen) is None  # more than there are


def test_a_token_is_drawn_by_its_probability_whatever_stands_beside_it() -> None:
    odds = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits = odds.log().repeat(4000, 1)
    drawn = drawing(0, range(4000))(logits).argmax(-1).tolist()
    counts = Counter(drawn)
    for token, share in enumerate(odds.tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.025)
    assert counts[1] == 0
    some = [7, 3999, 12]
    again = drawing(0, some)(logits[:3])
    assert again.argmax(-1).tolist() == [drawn[place] for place in some]
    assert torch.isfinite(again).sum(-1).tolist() == [1, 1, 1]
    assert drawing(1, range(4000))(logits).argmax(-1).tolist() != drawn


def test_what_a_broken_model_gives_is_drawn_from_too() -> None:
    logits = torch.full((2, 5), torch.nan)
    logits[1, 3] = torch.inf
    drawn = drawing(0, range(2))(logits)
    assert int(drawn[1].argmax()) == 3
    assert torch.isfinite(drawn).sum(-1).tolist() == [1, 1]


def measured(folder: Path, size: int, **how: Any) -> dict[str, Any]:
    settings = Settings(
        **{
            "forget": str(folder / "forget.jsonl"),
            "robustness": True,
            "batch_size": size,
            "device": "cpu",
            **how,
        }
    )
    return evaluate_models([str(folder / "base"), str(folder / "unlearned")], settings=settings)


@torch.no_grad()
def plainly(folder: Path, side: str) -> list[tuple[float, float]]:
    """Of each question the mean and the largest recall of its answers, drawn one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder / side)
    tokenizer = AutoTokenizer.from_pretrained(folder / side)
    proxy = read_proxy(str(folder / "forget.jsonl"))
    encoder = encoder_of(open_checkpoint(str(folder / side)), Settings())
    found = []
    for number, row in enumerate(encoder.rows(proxy)):
        recalls = []
        for sample in range(8):
            chance, ids = random.Random(f"0 {8 * number + sample}"), list(row.asked)
            for _ in range(TOKENS):
                odds = model(torch.tensor([ids])).logits[0, -1].softmax(-1).double().tolist()
                left, token = chance.random() * sum(odds), 0
                while left > odds[token]:
                    left, token = left - odds[token], token + 1
                ids.append(token)
            said = tokenizer.decode(ids[len(row.asked) :], skip_special_tokens=True)
            recalls.append(recall(proxy.rows[number].answer, said))
        found.append((mean(recalls), max(recalls)))
    return found


@pytest.mark.parametrize("size", [1, 4])
def test_the_figures_are_those_of_a_plain_loop_whatever_the_batches(
    size: int, models: Path
) -> None:
    report = measured(models, size)
    found = {
        (Path(one["model"]).name, one["metric"]): one
        for one in report["results"]
        if one["condition"] == "sampled"
    }
    assert len(found) == 4
    for side in ("base", "unlearned"):
        means, largest = zip(*plainly(models, side), strict=True)
        for metric, values in {"leak_at_1": means, "leak_at_8": largest}.items():
            one = found[side, metric]
            assert one["value"] == pytest.approx(mean(values), abs=1e-9)
            assert (one["rows"], one["direction"], one["set"]) == (5, "lower", "forget")
        assert 0 < found[side, "leak_at_1"]["value"] < found[side, "leak_at_8"]["value"]
    assert {g["metric"] for g in report["differences"] if g["condition"] == "sampled"} == {
        "leak_at_1",
        "leak_at_8",
    }


def reasons(report: dict[str, Any]) -> dict[str, str]:
    return {entry["what"]: entry["reason"] for entry in report["not_run"]}


def test_it_is_absent_with_its_reason(models: Path) -> None:
    none = measured(models, 4, generate_rows=0)
    texts = write_rows(models / "texts.jsonl", [{"text": f"w{n} w1 w2 w{n}"} for n in range(4)])
    unasked = measured(models, 4, forget=str(texts))
    small = measured(models, 4, memory=0.5)
    what = "leak_at_1 and leak_at_8 on forget"
    assert reasons(none)[what] == "--generate-rows is 0"
    assert reasons(unasked)[what] == "no row is answered in words"
    for side in ("base", "unlearned"):
        reason = reasons(small)[f"sampled answers of {models / side}"]
        assert "--memory allows 500 MB" in reason
    for report in (none, unasked, small):
        assert not any("leak" in one["metric"] for one in report["results"])


@pytest.mark.parametrize("rows, allowed, sampled", [(60, 100, 40), (60, 7, 7), (3, 100, 3)])
def test_how_many_questions_are_sampled(
    rows: int, allowed: int, sampled: int, models: Path
) -> None:
    proxy = read_proxy(str(write_rows(models / "many.jsonl", make_rows(rows, seed=2))))
    base = open_checkpoint(str(models / "base"))
    settings = Settings(robustness=True, generate_rows=allowed)
    asked = prepare("forget", proxy, base, settings)
    assert len(set(asked.sampled)) == sampled
    assert set(asked.sampled) <= set(asked.answered)
    assert prepare("heldout", proxy, base, settings).sampled == ()
    assert prepare("forget", proxy, base, Settings()).sampled == ()


def test_gates_know_it_where_it_is_measured(models: Path) -> None:
    proxies = {"forget": read_proxy(str(models / "forget.jsonl"))}

    def named(**how: Any) -> set[str]:
        names = expected_names(proxies, Settings(**how), ["base", "sanitized"])
        return {name for name in names if "leak" in name}

    assert {
        f"robustness.sampled.{model}forget.leak_at_{count}"
        for count in (1, 8)
        for model in ("", "base.", "unlearned.", "sanitized.")
    } == named(robustness=True)
    assert not named(robustness=True, generate_rows=0)
    assert not named()
