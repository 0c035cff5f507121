"""Shards that are fetched, kept and sent one at a time, and shards that are not fetched at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from safetensors.torch import load_file
from support.loopback_hub import Blob, LoopbackHub

from sage_hub.checkpoint import hubfiles as checkpoint
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.cli.main import main
from sage_hub.publish.opened import open_as_user
from sage_hub.publish.upload import Upload

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture
def statistics(pair: Path, tmp_path: Path) -> str:
    file = tmp_path / "statistics.safetensors"
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *retain, "--output", str(file)]) == 0
    return str(file)


def upload(hub: LoopbackHub, pair: Path) -> None:
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", pair / side)


def push(statistics: str, target: str, *options: str) -> int:
    words = ["push", "org/base", "org/unlearned", "--to", target, "--stats", statistics]
    return main([*words, "--yes", "--quiet", *options])


def weights(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.files(repo).items() if "safetensors" in name}


def downloaded(hub: LoopbackHub, file: Path) -> bool:
    """Whether the storage was asked for the bytes of `file`, but for its header."""
    return any(
        request.storage
        and request.method == "GET"
        and file_sha256(file) in request.path
        and "range" not in request.headers
        for request in hub.requests
    )


def test_one_shard_at_a_time_makes_the_same_release(
    hub: LoopbackHub, pair: Path, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, pair)
    most = {"base": 0, "unlearned": 0, "release": 0}
    fetch = checkpoint.hf_hub_download

    def watched(*args: Any, **options: Any) -> str:
        path: str = fetch(*args, **options)
        for folder in most:
            here = Path(HF_HOME, "sage-hub").rglob(f"{folder}/**/*.safetensors")
            most[folder] = max(most[folder], len(list(here)))
        return path

    monkeypatch.setattr(checkpoint, "hf_hub_download", watched)
    assert push(statistics, "org/piecewise", "--low-disk") == 0
    assert (most["base"], most["unlearned"]) == (1, 1)
    assert most["release"] <= 1
    assert list(Path(HF_HUB_CACHE).rglob("*.safetensors")) == []
    assert not Path(HF_HOME, "sage-hub", ".org--piecewise.partial").exists()

    assert push(statistics, "org/whole") == 0
    assert weights(hub, "org/piecewise") == weights(hub, "org/whole")
    report = json.loads(hub.files("org/piecewise")["sage/report.json"])
    assert report["not_run"] == [
        {
            "what": "all metrics",
            "reason": "with --low-disk and no --forget or --heldout no whole model is kept that "
            "could be run",
        }
    ]
    assert main(["verify", "org/piecewise", "--quiet"]) == 0
    assert len(hub.commits("org/piecewise")) == 2


def test_a_failure_publishes_nothing_and_the_same_command_finishes(
    hub: LoopbackHub, pair: Path, statistics: str
) -> None:
    upload(hub, pair)
    hub.fail("PUT", "/lfs/", 403, times=1)
    assert push(statistics, "org/piecewise", "--low-disk") == 11
    assert set(hub.files("org/piecewise")) == {".gitattributes"}
    assert push(statistics, "org/piecewise", "--low-disk") == 0
    assert push(statistics, "org/whole") == 0
    assert weights(hub, "org/piecewise") == weights(hub, "org/whole")


def test_no_shard_goes_while_the_release_is_opened(
    hub: LoopbackHub, pair: Path, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, pair)
    send, left = Upload._send, []

    def slowly(self: Upload, files: Mapping[str, Path]) -> None:
        time.sleep(0.2)
        send(self, files)

    def look(folder: Path, base: Checkpoint) -> None:
        left.append([path.name for path in folder.glob("*.safetensors")])
        open_as_user(folder, base)

    monkeypatch.setattr(Upload, "_send", slowly)
    monkeypatch.setattr("sage_hub.commands.push.open_as_user", look)
    assert push(statistics, "org/piecewise", "--low-disk") == 0
    assert left == [[]]


def test_calibration_keeps_no_more_than_two_shards(
    hub: LoopbackHub, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, pair)
    most = 0
    fetch = checkpoint.hf_hub_download

    def watched(*args: Any, **options: Any) -> str:
        nonlocal most
        path: str = fetch(*args, **options)
        here = list(Path(HF_HOME, "sage-hub").rglob("downloads/**/*.safetensors"))
        most = max(most, len(here))
        return path

    monkeypatch.setattr(checkpoint, "hf_hub_download", watched)
    retain = str(pair / "retain.jsonl")
    words = ["push", "org/base", "org/unlearned", "--yes", "--quiet", "--retain", retain]
    assert main([*words, "--to", "org/piecewise", "--low-disk"]) == 0
    assert most == 2
    assert list(Path(HF_HUB_CACHE).rglob("*.safetensors")) == []
    assert main([*words, "--to", "org/whole"]) == 0
    assert weights(hub, "org/piecewise") == weights(hub, "org/whole")


@pytest.mark.parametrize("copies", ["as the Hub likes", "refused", "not known"])
def test_a_shard_of_equal_hash_is_not_downloaded_and_copied_by_the_hub(
    copies: str, hub: LoopbackHub, pair: Path, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(pair / "base" / SHARDS[1], pair / "unlearned" / SHARDS[1])
    if copies != "not known":
        # Across repos the client copies only what has a Xet hash.
        monkeypatch.setattr(hub, "lfs_blob", lambda path: Blob.lfs(path, "a" * 64))
    upload(hub, pair)
    if copies == "refused":
        hub.fail("POST", "lfs-files/duplicate", 400)
    assert push(statistics, "org/piecewise", "--low-disk") == 0

    assert downloaded(hub, pair / "base" / SHARDS[0])
    assert downloaded(hub, pair / "base" / SHARDS[1]) == (copies != "as the Hub likes")
    manifest = json.loads(hub.files("org/piecewise")["sage/manifest.json"])
    assert {t["action"] for t in manifest["tensors"] if t["shard"] == SHARDS[1]} == {"identical"}
    published = hub.files("org/piecewise")
    assert published[SHARDS[1]] == (pair / "base" / SHARDS[1]).read_bytes()
    assert main(["verify", "org/piecewise", "--quiet"]) == 0


def test_a_shard_of_equal_hash_comes_along_in_a_folder(
    pair: Path, statistics: str, tmp_path: Path
) -> None:
    shutil.copyfile(pair / "base" / SHARDS[1], pair / "unlearned" / SHARDS[1])
    both = [str(pair / "base"), str(pair / "unlearned"), "--stats", statistics, "--quiet"]
    assert main(["sanitize", *both, "--output", str(tmp_path / "out")]) == 0
    copied = (tmp_path / "out" / SHARDS[1]).read_bytes()
    assert copied == (pair / "base" / SHARDS[1]).read_bytes()
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    other = str(tmp_path / "float32")
    assert main(["sanitize", *both, "--output", other, "--out-dtype", "float32"]) == 0
    types = {str(tensor.dtype) for tensor in load_file(f"{other}/{SHARDS[1]}").values()}
    assert types == {"torch.float32"}
