"""Two runs at the same time on one machine: neither breaks the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.loopback_hub import LoopbackHub
from support.processes import PROCESSES, run_hurried
from support.soak import SECRET, Tally, seeds


@pytest.mark.parametrize("seed", seeds(2, 19))
def test_with_the_same_caches(
    on_hub: LoopbackHub, pair: Path, tmp_path: Path, seed: int, tally: Tally
) -> None:
    """Both download the same files into the same HF_HOME, and share what they calibrate."""
    words = ["sanitize", "org/base", "org/unlearned", "--gain", "1", "--quiet"]
    words += ["--retain", str(pair / "retain.jsonl"), "--heldout", str(pair / "heldout.jsonl")]
    words += ["--stats-cache", str(tmp_path / "cache"), "--seed", str(seed)]
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    runs = [
        PROCESSES.Process(target=run_hurried, args=([*words, "--output", str(out)],))
        for out in outs
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=120)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    first, *others = (
        {path.name: path.read_bytes() for path in out.glob("*.safetensors")} for out in outs
    )
    assert first
    assert all(other == first for other in others)
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert len(kept) == 1, kept  # the statistics, and nothing half made
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.search(data.decode("latin-1")) for data in written)
    tally.count("Parallel runs", "three of a command, with the same caches", "equal bytes", 3)
