"""Attacks on membership: each as its source defines it, and their areas under the curve."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support.pico import make_rows, write_rows
from transformers import AutoModelForCausalLM

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.membership import ATTACKS, membership_auc, privleak
from sage_hub.evaluation.metrics import Seen
from sage_hub.evaluation.scoring import Scored
from sage_hub.evaluation.suites import Told
from sage_hub.evaluation.variants import evaluate_variants
from sage_hub.rows.encoding import encoder_of
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

(ROW,) = parse_rows([{"question": "w1", "answer": "w2"}], "set")


def seen(logprobs: np.ndarray) -> Seen:
    hits = np.zeros(len(logprobs), bool)
    return Seen(ROW, Told(Scored(logprobs.astype(np.float32), hits)), counted="w2")


def test_the_area_is_that_of_telling_unseen_rows_from_those_to_forget() -> None:
    chance = np.random.default_rng(0)
    forget = [-chance.exponential(1.0, 7) for _ in range(9)]
    unseen = [-chance.exponential(1.5, 5) for _ in range(6)]

    def surprise(one: np.ndarray) -> float:
        return -float(np.mean(sorted(one)[: int(0.4 * len(one))]))

    truth = [0] * len(forget) + [1] * len(unseen)
    expected = roc_auc_score(truth, [surprise(one) for one in (*forget, *unseen)])
    found = membership_auc(
        [seen(one) for one in forget], [seen(one) for one in unseen], ATTACKS["mia_min_k"]
    )
    assert found == pytest.approx(expected)


def test_privleak_is_negative_where_the_model_still_knows() -> None:
    assert privleak(1.0, 0.5) == -100
    assert privleak(0.5, 0.5) == 0
    assert privleak(0.1, 0.5) == pytest.approx(80)


@torch.inference_mode()
def test_each_attack_is_its_definition_on_a_whole_model(pair: Path, tmp_path: Path) -> None:
    files = {
        which: write_rows(tmp_path / f"{which}.jsonl", make_rows(8, seed))
        for seed, which in enumerate(("forget", "unseen"))
    }
    proxies = {which: read_proxy(str(file)) for which, file in files.items()}
    given = {which: str(file) for which, file in files.items()}
    settings = Settings(**given, generate_rows=0, device="cpu", compute_dtype="float32")
    checkpoint = open_checkpoint(str(pair / "unlearned"))
    study = Study(proxies, checkpoint)
    found = evaluate({"model": Candidate(checkpoint)}, study, settings, tmp_path)
    values = {one.metric: one.value for one in found.results if one.set == "forget"}
    model = AutoModelForCausalLM.from_pretrained(pair / "unlearned", dtype=torch.float32).eval()
    encoder = encoder_of(checkpoint, settings)
    scores: dict[str, list[float]] = {name: [] for name in ATTACKS}
    for which in ("forget", "unseen"):
        for row in encoder.rows(proxies[which]):
            ids, start = torch.tensor([row.ids]), row.answer_start
            logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            own = logprobs.gather(1, ids[0, start:, None])[:, 0]
            weights = logprobs.exp()
            mean = (weights * logprobs).sum(-1)
            spread = (weights * logprobs**2).sum(-1) - mean**2
            some = max(1, int(0.4 * len(own)))
            text = encoder.tokenizer.decode(row.ids[start:], skip_special_tokens=True)
            loss = -float(own.mean())
            scores["mia_loss"].append(loss)
            scores["mia_zlib"].append(loss / len(zlib.compress(text.encode())))
            scores["mia_min_k"].append(-float(own.sort().values[:some].mean()))
            standard = (own - mean) / spread.clamp(min=1e-6).sqrt()
            scores["mia_min_k_plus_plus"].append(-float(standard.sort().values[:some].mean()))
    for name, own_scores in scores.items():
        expected = roc_auc_score([0] * 8 + [1] * 8, own_scores)
        assert values[name] == pytest.approx(expected, abs=1e-6), name
    without = replace(settings, unseen=None)
    # What a search has seen of the rows says nothing of the vocabulary beside them.
    pair_of = {"model": None}
    known = evaluate_variants(checkpoint, checkpoint, pair_of, study, without, tmp_path)
    again = replace(study, known={"model": known["model"].known})
    told = evaluate({"model": Candidate(checkpoint)}, again, settings, tmp_path)
    assert {one.metric: one.value for one in told.results if one.set == "forget"} == values
    alone = Study({"forget": proxies["forget"]}, checkpoint)
    fewer = evaluate({"model": Candidate(checkpoint)}, alone, without, tmp_path)
    assert not {one.metric for one in fewer.results} & ATTACKS.keys()
