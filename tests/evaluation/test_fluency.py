"""What the base makes of the answers of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.pico import make_rows, write_rows
from transformers import AutoModelForCausalLM

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.checkpoint.pair import open_unlearned
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.rows.encoding import encoder_of
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings


@torch.inference_mode()
def test_it_is_the_base_s_loss_on_what_was_said(pair: Path, tmp_path: Path) -> None:
    rows = read_proxy(str(write_rows(tmp_path / "forget.jsonl", make_rows(6, 0))))
    base = open_checkpoint(str(pair / "base"))
    models = {
        "base": Candidate(base),
        "unlearned": Candidate(open_unlearned(str(pair / "unlearned"), base)),
    }
    settings = Settings(device="cpu", compute_dtype="float32", max_length=40)
    found = evaluate(models, Study({"forget": rows}, base), settings, tmp_path)
    values = {one.model: one.value for one in found.results if one.metric == "fluency"}
    reader = AutoModelForCausalLM.from_pretrained(pair / "base", dtype=torch.float32).eval()
    encoder = encoder_of(base, settings)
    for model in models:
        losses = []
        for one in found.seen[model]["forget"]:
            row = encoder.row(replace(one.row, answer=f" {one.said}"), "row")
            logprobs = reader(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(row.ids)[1:, None])[row.answer_start - 1 :]
            losses.append(-float(own.mean()))
        assert values[model] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert values["base"] < values["unlearned"]  # which says what the base would not
    silent = evaluate(
        models, Study({"forget": rows}, base), replace(settings, generate_rows=0), tmp_path
    )
    assert "fluency" not in {one.metric for one in silent.results}
