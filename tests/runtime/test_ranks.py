"""Several processes at one job give what one gives, and go down together."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from support.architectures import make_model
from support.loopback_hub import LoopbackHub
from support.pico import make_rows, make_tokenizer, update, write_rows
from support.processes import PROCESSES, run_hurried
from support.soak import soak
from transformers import LlamaForCausalLM

from sage_hub.cli.main import main
from sage_hub.publish.folder import work_folder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(words: Sequence[str], count: int) -> subprocess.Popen[str]:
    command = [*TORCHRUN, "--nproc-per-node", str(count), "-m", "sage_hub", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def with_torchrun(words: Sequence[str], count: int, status: int = 0) -> tuple[str, str]:
    process = start(words, count)
    out, err = process.communicate(timeout=300)
    assert (process.returncode == 0) == (status == 0), err
    return out, err


def together(words: Sequence[str], count: int, status: int = 0) -> str:
    """As `with_torchrun`, in processes that need not import anything; what all of them say."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = Path("said").absolute()
    said.write_text("")
    processes = [
        PROCESSES.Process(target=take_part, args=(words, rank, count, port, str(said)))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [status] * count
    return said.read_text()


def take_part(words: Sequence[str], rank: int, count: int, port: int, said: str) -> None:
    """Be one of the processes, told so as torchrun tells it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    with Path(said).open("a") as sys.stdout:
        run_hurried(words)


def alone(words: Sequence[str]) -> str:
    with redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    return out.getvalue()


def sources(pair: Path) -> list[str]:
    sets = [f"--{name}={pair / name}.jsonl" for name in ("retain", "forget", "heldout")]
    return [str(pair / "base"), str(pair / "unlearned"), *sets]


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("count", [torch.cuda.device_count() or 3, soak(2)])
def test_several_processes_make_the_release_of_one(count: int, pair: Path, tmp_path: Path) -> None:
    statistics = str(tmp_path / "base.safetensors")
    alone(["stats", *sources(pair)[:1], *sources(pair)[2:4], "--output", statistics, "-q"])
    words = ["sanitize", *sources(pair), "--stats", statistics, "--gain", "match", "--json", "-q"]
    folders = tmp_path / "one", tmp_path / "several"
    said = [alone([*words, "--output", str(folders[0])])]
    said += [with_torchrun([*words, "--output", str(folders[1])], count)[0]]
    found = [json.loads(out) for out in said]  # one object, from the first
    assert shards(folders[0]) == shards(folders[1])
    manifests = [json.loads((out / "sage" / "manifest.json").read_text()) for out in folders]
    assert manifests[0] == manifests[1]
    one, several = (made["report"]["results"] for made in found)
    same(one, several)
    # Models (the source is the control), the metrics of each set, and fluency.
    assert len(one) == 3 * (4 + 6 + 6 + 1)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same figures, but for rounding."""
    for a, b in zip(one, other, strict=True):
        assert a | {"value": 0, "interval": 0} == b | {"value": 0, "interval": 0}
        assert a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-6)
        assert a["interval"] == pytest.approx(b["interval"], rel=1e-2, abs=1e-3)


def test_several_processes_evaluate_what_one_does(pair: Path) -> None:
    models = [str(pair / "base"), str(pair / "unlearned")]
    words = ["eval", *models, "--forget", str(pair / "forget.jsonl"), "--generate-rows", "5"]
    reference = LlamaForCausalLM.from_pretrained(pair / "base")
    update(reference, seed=2, size=0.1)
    reference.save_pretrained(pair / "reference")
    words += ["--robustness", "--json", "--depth", "--reference", str(pair / "reference")]
    one, two = (json.loads(out)["results"] for out in (alone(words), together(words, 2)))
    kinds = {(result["metric"], result["condition"]) for result in one}
    assert {("rougeL_recall", None), ("probability", "int4"), ("probability", "relearned")} <= kinds
    assert ("uds_answer", None) in kinds
    same(one, two)


@pytest.mark.parametrize("moments", ["exact", "sketch"])
def test_several_processes_see_what_one_sees(moments: str, tmp_path: Path) -> None:
    make_model("Mixtral").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "retain.jsonl", make_rows(9, seed=0))  # some experts see too little
    words = ["stats", str(tmp_path / "base"), "--retain", str(tmp_path / "retain.jsonl"), "-q"]
    words += ["--moments", moments, "--batch-size", "2", "--json"]
    one, three = str(tmp_path / "one.st"), str(tmp_path / "three.st")
    about = [json.loads(alone([*words, "--output", one]))]
    about += [json.loads(together([*words, "--output", three], 3))]
    assert about[0]["data"] == about[1]["data"]
    assert about[0]["data"]["retain"]["experts_shown_block_input"]
    expected, found = load_file(one), load_file(three)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        if name.endswith("values"):
            top = float(tensor.max())
            assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-4 * top), name


def test_only_the_first_publishes(hub: LoopbackHub, pair: Path) -> None:
    words = ["push", *sources(pair), "--to", "org/released", "--yes", "--quiet"]
    out = together(words, 2)
    assert len(hub.commits("org/released")) == 2  # the empty repo, and the release
    assert out.count("org/released/commit/") == 1


def test_an_error_comes_from_the_process_that_has_it(pair: Path, tmp_path: Path) -> None:
    words = ["sanitize", *sources(pair), "--output", str(tmp_path / "out"), "--memory", "0.1"]
    _, err = with_torchrun(words, 2, status=26)
    assert "--memory allows 100 MB" in err
    assert "/sage_hub/" not in err  # torchrun prints a traceback, of its own lines
    assert not (tmp_path / "out").exists()


def test_what_stops_the_first_stops_all_with_its_status(
    hub: LoopbackHub, pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["sanitize", *sources(pair)[:3], "--gain", "1", "--output", str(out), "-q", "--json"]
    together(words, 2)
    before = shards(out)
    replacing = [*words, "--strength", "3", "--gate", "gain > 100"]
    found = json.loads(together(replacing, 2, status=30))  # stopped where it replaces a release
    assert (found["status"], found["kept"]["what"]) == (30, "the release")
    assert shards(out) == before
    with FileLock(work_folder(out) / "lock"):
        assert json.loads(together(words, 2, status=23))["error"] == "TargetError"
    words = ["push", *sources(pair)[:3], "--gain", "1", "--to", "org/x", "-q", "--yes", "--json"]
    hub.add_repo("org/x", {"README.md": b"of somebody else"})
    assert json.loads(together(words, 2, status=23))["error"] == "TargetError"


def test_more_processes_than_gpus(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["sanitize", *sources(pair), "--output", "out"]) == 2
    assert "than there are GPUs (2): use --nproc-per-node 2, or hide" in capsys.readouterr().err


def test_a_process_that_dies_stops_the_job_which_goes_on_later(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["sanitize", *sources(pair), "--output", str(out), "--quiet"]
    process = start(words, 2)
    try:
        statistics = tmp_path / ".out.partial" / "statistics.safetensors"
        until = time.monotonic() + 200
        while not statistics.exists():
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        second = next(
            int(pid)
            for pid in os.listdir("/proc")
            if pid.isdigit() and _is_rank(int(pid), 1, str(out))
        )
        os.kill(second, signal.SIGKILL)
        kept = shutil.copy(statistics, tmp_path / "kept.safetensors")
        _, err = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, err
    assert not out.exists()
    together(words, 2)
    alone([*words[:-3], "--stats", str(kept), "--output", str(tmp_path / "alone"), "--quiet"])
    assert shards(out) == shards(tmp_path / "alone")


def _is_rank(pid: int, rank: int, word: str) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return False
    return word in command and f"RANK={rank}" in environment
