"""What calibration sees of a site: its inputs, and how large its maps make them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.architectures import ARCHITECTURES, load, make_model
from support.pico import make_rows, make_tokenizer, write_rows

from sage_hub.calibration.statistics import open_statistics
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.cli.main import main
from sage_hub.model.weights import as_rows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_what_the_weights_make_of_the_inputs(name: str, tmp_path: Path) -> None:
    """tr(W C Wᵀ) of every map, without its bias, be it an expert, transposed or an ordinary one."""
    make_model(name).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "retain.jsonl", make_rows(20, seed=0))
    file = tmp_path / "statistics.safetensors"
    command = ["stats", str(tmp_path / "base"), "--retain", str(rows), "--output", str(file)]
    assert main([*command, "--energy", "1", "--compute-dtype", "float32", "--quiet"]) == 0
    weights = load(tmp_path / "base").double().state_dict()
    maps = {
        linear.name: (parameter, linear)
        for parameter, own in open_checkpoint(str(tmp_path / "base")).architecture.linears.items()
        for linear in own
    }
    with open_statistics(file) as statistics:
        assert statistics.outputs.keys() == statistics.site_of.keys()
        for module, site in statistics.site_of.items():
            parameter, linear = maps[module]
            own = as_rows(weights[parameter])[linear.start : linear.stop]
            seen = statistics.spectrum("retain", site)
            along = (own.T if linear.transposed else own) @ seen.basis.double().T
            expected = float((along.square().sum(0) * seen.values).sum())
            assert statistics.outputs[module] == pytest.approx(expected, rel=1e-4), module
