"""The main job end to end: two sharded models on a Hub become a third, in one commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.loopback_hub import LoopbackHub
from support.pico import proxies
from support.reference import sanitized_reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_hub.cli.main import main


@pytest.mark.parametrize("gain", ["1", "match", "auto"])
def test_push_from_hub_to_hub(hub: LoopbackHub, pair: Path, gain: str, tmp_path: Path) -> None:
    shas = {side: hub.add_repo(f"org/{side}", pair / side) for side in ("base", "unlearned")}
    status = main(
        ["push", "org/base", "org/unlearned", "--yes", "--quiet", "--gain", gain, *proxies(pair)]
    )
    assert status == 0

    # One commit takes the target from nothing (but .gitattributes) to complete.
    commits = hub.commits("org/unlearned-sage")
    assert len(commits) == 2
    assert set(commits[0].files) <= {".gitattributes"}

    manifest = json.loads(hub.files("org/unlearned-sage")["sage/manifest.json"])
    assert {s: manifest["sources"][s]["commit"] for s in shas} == shas

    # The weights that a user downloads equal the whole-model float64 reference.
    model = AutoModelForCausalLM.from_pretrained("org/unlearned-sage", dtype="auto")
    AutoTokenizer.from_pretrained("org/unlearned-sage")
    sides = pair / "base", pair / "unlearned"
    retain = [json.loads(line) for line in (pair / "retain.jsonl").read_text().splitlines()]
    shares = manifest["gain_shares"]
    own: dict[str, Any] = {name: manifest["settings"][name] for name in ("strength", "energy")}
    assert own == {"strength": 10, "energy": 0.9} | (
        {"strength": 100, "energy": 0.99} if gain == "auto" else {}
    )
    expected = sanitized_reference(*sides, retain, gain=manifest["gain"], shares=shares, **own)
    state = model.state_dict()
    filtered = {t["name"] for t in manifest["tensors"] if t["action"] == "filtered"}
    assert len(filtered) == 14
    for name, tensor in expected.items():
        assert state[name].dtype == torch.bfloat16
        # bfloat16 has 8 bits, so one unit in the last place is 2^-8 of the value at most.
        torch.testing.assert_close(state[name].double(), tensor, rtol=2**-7, atol=1e-6)
        if name not in filtered:
            assert torch.equal(state[name].double(), tensor), name

    card = ModelCard(hub.files("org/unlearned-sage")["README.md"].decode())
    assert card.data.base_model == ["org/base", "org/unlearned"]
    assert {r.metric_type for r in card.data.eval_results} >= {
        "forget_probability",
        "heldout_probability",
    }


@pytest.mark.usefixtures("unhurried")
def test_two_runs_give_the_same_bytes(pair: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        out = str(tmp_path / name)
        arguments = [str(pair / "base"), str(pair / "unlearned"), "--output", out, "--quiet"]
        assert main(["sanitize", *arguments, *proxies(pair)]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    files = {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
    assert files == {p.relative_to(two) for p in two.rglob("*") if p.is_file()}
    varying = {Path(name) for name in ("README.md", "sage/report.json", "SHA256SUMS")}
    for file in files - varying:  # name, seconds
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_the_record_has_the_commit_of_all_that_is_on_the_hub(
    hub: LoopbackHub, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the card's command, and `verify --rebuild`, take what this run took."""
    rows = {f"{name}.jsonl": (pair / f"{name}.jsonl").read_bytes() for name in ("retain", "forget")}
    at = {side: hub.add_repo(f"org/{side}", pair / side) for side in ("base", "unlearned")}
    at["reference"] = hub.add_repo("org/reference", pair / "base")
    at["rows"] = hub.add_repo("org/rows", rows, "dataset")
    words = ["sanitize", "org/base", "org/unlearned", "--output", "out", "--gain", "1", "-q"]
    words += ["--retain", "hf://datasets/org/rows/retain.jsonl", "--reference", "org/reference"]
    words += ["--bystander", "more=hf://datasets/org/rows@main/forget.jsonl"]
    assert main(words) == 0
    settings = json.loads(Path("out/sage/manifest.json").read_text())["settings"]
    assert settings["retain"] == f"hf://datasets/org/rows@{at['rows']}/retain.jsonl"
    more = f"hf://datasets/org/rows@{at['rows']}/forget.jsonl"
    assert settings["bystanders"] == {"more": more}
    assert settings["reference"] == f"org/reference@{at['reference']}"
    card = Path("out/README.md").read_text()
    assert f"--retain {settings['retain']}" in card
    hub.add_commit("org/rows", {"retain.jsonl": b'{"text": "w1 w2 w3"}\n'}, "dataset")
    assert main(["verify", "out", "--rebuild"]) == 0
