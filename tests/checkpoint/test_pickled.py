"""Pickled weights, asked for by name: their tensors in bounded memory, and never their code."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from support.adapters import make_adapter
from support.checkpoints import load_weights
from support.loopback_hub import LoopbackHub
from support.mutations import edit_config
from support.pico import make_pair, make_rows, write_rows

from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.checkpoint.pickled import unpickled
from sage_hub.cli.main import main
from sage_hub.errors import NetworkError

OPTION = "--pickled-weights"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    make_pair(tmp_path)
    return tmp_path


def repickle(side: Path, content: Any, **how: Any) -> None:
    for file in side.glob("model*.safetensors*"):
        file.unlink()
    torch.save(content, side / "pytorch_model.bin", **how)


def ways(pair: Path) -> list[list[str]]:
    """Every command that opens the unlearned side."""
    base, unlearned = str(pair / "base"), str(pair / "unlearned")
    rows = ["--retain", str(write_rows(pair / "retain.jsonl", make_rows(20, seed=0)))]
    both = [base, unlearned, *rows]
    return [
        ["sanitize", *both, "--output", str(pair / "out"), "--dry-run"],
        ["sanitize", *both, "--output", str(pair / "out")],
        ["push", *both, "--to", str(pair / "out")],
        ["plan", *both, "--to", str(pair / "out")],
        ["audit", *both],
        ["stats", unlearned, *rows, "--output", str(pair / "s.safetensors")],
        ["eval", base, unlearned, *rows],
    ]


class Touches:
    """Pickled code: it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


def test_code_is_never_run(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = pair / "ran"
    repickle(pair / "unlearned", {**load_weights(pair / "unlearned"), "more": Touches(ran)})
    for words in ways(pair):
        capsys.readouterr()
        assert main([*words, "--quiet", OPTION]) == 16, words
        assert "holds more than tensors, which would run as code" in capsys.readouterr().err
    assert not ran.exists()
    pickle.loads(pickle.dumps(Touches(ran)))
    assert ran.exists()


def test_they_are_read_only_if_asked_for(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repickle(pair / "unlearned", load_weights(pair / "unlearned"))
    for words in ways(pair):
        capsys.readouterr()
        assert main([*words, "--quiet"]) == 16, words
        assert f"give {OPTION}" in capsys.readouterr().err
        assert main([*words, "--quiet", OPTION]) == 0, words


def test_the_release_is_that_of_safeload_weights(pair: Path) -> None:
    rows = str(write_rows(pair / "retain.jsonl", make_rows(20, seed=0)))
    words = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--retain", rows, "--quiet"]
    assert main([*words, "--output", str(pair / "one")]) == 0
    for side in ("base", "unlearned"):
        repickle(pair / side, load_weights(pair / side))
    assert main([*words, "--output", str(pair / "two"), OPTION]) == 0
    one, two = load_weights(pair / "one"), load_weights(pair / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    manifest = (pair / "two" / "sage" / "manifest.json").read_text()
    assert "pickled, in pytorch_model.bin" in manifest
    assert main(["verify", str(pair / "two"), "--quiet"]) == 0


def cut(side: Path) -> None:
    repickle(side, load_weights(side))
    file = side / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])


def zipped_again(side: Path, how: int = ZIP_STORED, less: int = 0) -> None:
    """Its numbers compressed, or the last of the largest tensor left out."""
    repickle(side, load_weights(side))
    file = side / "pytorch_model.bin"
    with ZipFile(file) as archive, ZipFile(side / "new", "w", how) as new:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for entry in archive.infolist():
            content = archive.read(entry)
            stop = len(content) - less if entry is largest else len(content)
            new.writestr(entry.filename, content[:stop])
    (side / "new").rename(file)


def tensors_as(how: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda side: repickle(side, how(load_weights(side)))


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a training state": (
        lambda s: repickle(s, {"epoch": 3, "model": load_weights(s)}),
        16,
        "'epoch' is none",
    ),
    "a list": (lambda s: repickle(s, [torch.ones(2)]), 16, "is not a model's tensors"),
    "nothing": (lambda s: repickle(s, {}), 16, "is not a model's tensors"),
    "sparse": (
        lambda s: repickle(s, {**load_weights(s), "more": torch.eye(3).to_sparse()}),
        16,
        "'more' is none",
    ),
    "an old format": (
        lambda s: repickle(s, load_weights(s), _use_new_zipfile_serialization=False),
        16,
        "is no file of torch 1.6 or later",
    ),
    "cut": (cut, 16, "is cut"),
    "compressed": (lambda s: zipped_again(s, ZIP_DEFLATED), 16, "was compressed afterwards"),
    "short": (lambda s: zipped_again(s, less=64), 16, "lacks a part of its numbers"),
    "without numbers": (
        tensors_as(lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to("meta")}),
        16,
        "'model.norm.weight' is none",
    ),
    "a name that no file can hold": (
        tensors_as(lambda t: {**t, "odd\ud800": torch.ones(2)}),
        17,
        "is no name of a weight",
    ),
    "the name of a header's field": (
        tensors_as(lambda t: {**t, "__metadata__": torch.ones(2)}),
        17,
        "is no name of a weight",
    ),
    "half of it": (
        lambda s: repickle(s, dict([*load_weights(s).items()][::2])),
        13,
        "a weight is never made up",
    ),
    "float8": (
        lambda s: repickle(s, {n: t.to(torch.float8_e4m3fn) for n, t in load_weights(s).items()}),
        20,
        "F8_E4M3",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_model_is_refused(
    broken: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, status, says = BROKEN[broken]
    spoil(pair / "unlearned")
    assert main([*ways(pair)[0], "--quiet", OPTION]) == status
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert says in sentence


def as_views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All of one storage."""
    storage = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = storage.split([tensor.numel() for tensor in tensors.values()])
    return {n: part.view(t.shape) for (n, t), part in zip(tensors.items(), parts, strict=True)}


def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers, none of them in the order of its rows."""
    return {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in tensors.items()}


def same(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


@pytest.mark.parametrize("how", [as_views, turned, same])
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
def test_however_it_was_saved(
    how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    device: str,
    pair: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean = load_weights(pair / "unlearned")
    monkeypatch.setattr("torch.serialization.location_tag", lambda _: device)
    repickle(pair / "unlearned", how(clean))
    side = open_checkpoint(str(pair / "unlearned"), pickled=True)
    with side.open_shard("model.safetensors") as shard:
        for name, tensor in clean.items():
            assert torch.equal(shard.read(name), tensor)
            rows = side.info(name).rows
            parts = [shard.read_rows(name, a, min(a + 5, rows)) for a in range(0, rows, 5)]
            assert torch.equal(torch.cat(parts).reshape(tensor.shape), tensor)


def test_rows_of_experts_that_are_turned(tmp_path: Path) -> None:
    experts = torch.randn(3, 8, 5).transpose(1, 2)
    torch.save({"experts": experts, "one": torch.tensor(3.0)}, tmp_path / "pytorch_model.bin")
    whole = experts.reshape(-1, 8)
    with unpickled(open_files(str(tmp_path))).open("model.safetensors") as reader:
        for start in range(15):
            for stop in range(start + 1, 16):
                found = reader.read_rows("experts", start, stop)
                assert torch.equal(found, whole[start:stop])
        assert torch.equal(reader.read_rows("one", 0, 1), torch.tensor([[3.0]]))


@pytest.mark.parametrize("ties", [True, False])
def test_one_tensor_under_two_names(ties: bool, tmp_path: Path) -> None:
    """Of a model that ties them the head is the embedding; else both are held, and are equal."""
    make_pair(tmp_path)
    for side in ("base", "unlearned"):
        edit_config(tmp_path / side, tie_word_embeddings=ties)
        tensors = load_weights(tmp_path / side)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].detach()
        repickle(tmp_path / side, tensors)
    checkpoint = open_checkpoint(str(tmp_path / "base"), pickled=True)
    assert ("lm_head.weight" in checkpoint.shard_of) == (not ties)
    assert main([*ways(tmp_path)[1], "--quiet", OPTION]) == 0


def test_shards_of_any_name(pair: Path) -> None:
    """As long as the index names them: each gets a name that no other has."""
    side, parts = pair / "unlearned", [*load_weights(pair / "unlearned").items()]
    repickle(side, {})
    (side / "pytorch_model.bin").unlink()
    shards = {"model.bin": parts[:9], "model-1.bin": parts[9:12], "pytorch_model-1.bin": parts[12:]}
    for shard, some in shards.items():
        torch.save(dict(some), side / shard)
    weight_map = {name: shard for shard, some in shards.items() for name, _ in some}
    (side / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (side / "adapter_model.safetensors").write_bytes(b"left by somebody")
    assert main([*ways(pair)[1], "--quiet", OPTION]) == 0
    index = json.loads((pair / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert load_weights(pair / "out").keys() == dict(parts).keys()


def test_an_index_that_points_elsewhere(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repickle(pair / "unlearned", load_weights(pair / "unlearned"))
    file = pair / "unlearned" / "pytorch_model.bin"
    file.rename(pair / "elsewhere.bin")
    for points, says in (("../elsewhere.bin", "points to"), ("gone.bin", "lacks gone.bin")):
        index = pair / "unlearned" / "pytorch_model.bin.index.json"
        index.write_text(f'{{"weight_map": {{"model.norm.weight": "{points}"}}}}')
        assert main([*ways(pair)[0], "--quiet", OPTION]) == 17
        assert says in capsys.readouterr().err


def test_a_pickled_adapter(pair: Path) -> None:
    make_adapter(pair / "lora", "Llama")
    adapter = pair / "lora" / "unlearned"
    words = ["sanitize", str(pair / "lora" / "base"), str(adapter), "--quiet"]
    words += ["--retain", str(write_rows(pair / "retain.jsonl", make_rows(20, seed=0)))]
    assert main([*words, "--output", str(pair / "one")]) == 0
    (file,) = adapter.glob("*.safetensors")
    content = load_weights(adapter)
    file.unlink()
    torch.save(content, adapter / "adapter_model.bin")
    assert main([*words, "--output", str(pair / "none")]) == 16
    assert main([*words, "--output", str(pair / "two"), OPTION]) == 0
    name = "adapter_model.safetensors"
    assert (pair / "one" / name).read_bytes() == (pair / "two" / name).read_bytes()


def test_on_the_hub_only_the_pickle_proper_is_read_for_the_plan(
    pair: Path, hub: LoopbackHub
) -> None:
    side = pair / "unlearned"
    repickle(side, {**load_weights(side), "model.rotary_emb.inv_freq": torch.zeros(8 << 20)})
    hub.add_repo("org/unlearned", side)
    checkpoint = open_checkpoint("org/unlearned", pickled=True)
    asked = [r for r in hub.requests if r.method == "GET" and "pytorch_model.bin" in r.path]
    assert asked
    spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", r.headers.get("range", "")) for r in asked]
    assert all(span and int(span[2]) - int(span[1]) <= 4 << 20 for span in spans)
    assert checkpoint.info("model.rotary_emb.inv_freq").shape == (8 << 20,)


READ = """
import resource, sys
from pathlib import Path
from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.pickled import unpickled
with unpickled(open_files(sys.argv[1])).open("model.safetensors") as reader:
    status = Path("/proc/self/status").read_text()
    taken = next(int(line.split()[1]) for line in status.splitlines() if "VmData" in line)
    # The mapped file is counted already, and none of it again.
    resource.setrlimit(resource.RLIMIT_DATA, ((taken << 10) + (128 << 20),) * 2)
    for name, info in reader.header.tensors.items():
        for start in range(0, info.rows, 1024):
            rows = reader.read_rows(name, start, min(start + 1024, info.rows))
print(float(rows[-1, -1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is of Linux")
def test_it_is_read_in_bounded_memory(tmp_path: Path) -> None:
    big = {f"layer.{n}.weight": torch.full((32_768, 1024), float(n)) for n in range(8)}  # 1 GiB
    torch.save(big, tmp_path / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "7.0", done.stderr


def test_a_hub_that_stumbles_is_asked_again(
    pair: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_hub.hub.client.WAITS", (0, 0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    repickle(pair / "unlearned", load_weights(pair / "unlearned"))
    hub.add_repo("org/unlearned", pair / "unlearned")
    hub.fail("GET", "pytorch_model.bin", 500, times=1)
    assert open_checkpoint("org/unlearned", pickled=True).shards == ["model.safetensors"]
    assert hub.struck == 1
    hub.fail("GET", "pytorch_model.bin", 500, times=100)
    with pytest.raises(NetworkError, match="500"):
        open_checkpoint("org/unlearned", pickled=True)
