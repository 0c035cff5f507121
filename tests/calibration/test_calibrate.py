"""Calibration on awkward rows: what is said of them, and what must not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import change
from support.pico import make_rows, write_rows

from sage_hub.calibration.statistics import open_statistics
from sage_hub.cli.main import main


def stats(base: Path, rows: list[Any], output: Path, *options: str) -> int:
    proxy = write_rows(output.with_suffix(".jsonl"), rows)
    return main(["stats", str(base), "--retain", str(proxy), "--output", str(output), *options])


@pytest.mark.parametrize("moments", ["exact", "sketch"])
def test_order_and_batches_of_the_rows_matter_to_rounding_only(
    moments: str, pair: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"w{n} " * (n % 7 + 2) + "w1"} for n in range(30)]
    made = []
    for name, some, size in (("a", rows, "8"), ("b", rows[::-1], "3"), ("c", rows, "1")):
        file = tmp_path / f"{name}.safetensors"
        assert (
            stats(pair / "base", some, file, "-q", "--batch-size", size, "--moments", moments) == 0
        )
        made.append(load_file(file))
    for other in made[1:]:
        for name, tensor in made[0].items():
            if name.endswith("values"):
                top = float(tensor.max())
                assert torch.allclose(other[name], tensor, rtol=2e-2, atol=1e-3 * top), name


def test_what_a_person_should_know_of_the_proxy(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "w1 w2 w3 w4 w5 w6 w7 w8"}, {"text": "w2 w3"}]
    file = tmp_path / "few.safetensors"
    assert stats(pair / "base", rows, file, "--max-length", "5", "--moments", "sketch") == 0
    err = capsys.readouterr().err
    assert "1 rows of the retain proxy are longer than --max-length and were cut." in err
    assert "The retain proxy has 7 tokens, fewer than" in err
    assert "sites are sketched" in err
    with open_statistics(file) as found:
        site = found.site_of["model.layers.0.mlp.down_proj"]
        held = found.spectrum("retain", site)
        assert int((held.values > 1e-6 * held.trace).sum()) <= 7
        assert set(found.sketched) == {f"retain/{site.name}" for site in found.sites}


def test_a_number_that_is_none_is_traced_to_site_and_row(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = make_rows(6, seed=5)
    rows = [{k: v.replace("w59", "w58") for k, v in row.items()} for row in rows]
    rows[3]["question"] += " w59"

    def broken(tensor: torch.Tensor) -> torch.Tensor:
        tensor[66] = float("nan")  # w59
        return tensor

    change(pair / "base", "model.embed_tokens.weight", broken)
    file = tmp_path / "none.safetensors"
    assert stats(pair / "base", rows, file, "-q") == 15
    assert "hold NaN or Inf on row 4 of the retain proxy" in capsys.readouterr().err
    assert not file.exists()
