"""Where people keep weights: found there, or the sentence names what is there and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from support.checkpoints import INDEX, load_weights
from support.loopback_hub import LoopbackHub

from sage_hub.checkpoint.location import parse_location
from sage_hub.cli.main import main
from sage_hub.errors import UsageError


def without_weights(side: Path) -> Path:
    for file in [*side.glob("*.safetensors"), side / INDEX]:
        file.unlink()
    return side


def put(side: Path, *names: str) -> Path:
    """Files of these names in the place of the weights."""
    without_weights(side)
    for name in names:
        (side / name).parent.mkdir(parents=True, exist_ok=True)
        (side / name).write_bytes(b"what is in it is not read")
    return side


def in_one(side: Path, name: str) -> None:
    """All weights in one file of this name."""
    tensors = load_weights(side)
    save_file(tensors, without_weights(side) / name, metadata={"format": "pt"})


def no_index(side: Path) -> None:
    (side / INDEX).unlink()


def deeper(*folders: str) -> Callable[[Path], None]:
    def move(side: Path) -> None:
        for folder in folders:
            shutil.copytree(side, side.parent / "copy" / folder)
        shutil.rmtree(side)
        shutil.move(side.parent / "copy", side)

    return move


LAYOUTS: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "no index": (no_index, 10, ["model-00001-of-0000", "without their index"]),
    "one of one": (
        lambda side: in_one(side, "model-00001-of-00001.safetensors"),
        *(10, ["model-00001-of-00001.safetensors", "rename it to model.safetensors"]),
    ),
    "variant": (
        lambda side: in_one(side, "model.fp16.safetensors"),
        *(10, ["model.fp16.safetensors", "rename it"]),
    ),
    "diffusion": (
        lambda side: in_one(side, "weights.safetensors"),
        *(10, ["weights.safetensors", "rename it"]),
    ),
    "consolidated": (
        lambda side: put(side, "consolidated.safetensors", "params.json"),
        *(10, ["consolidated.safetensors", "convert_"]),
    ),
    "llama": (lambda side: put(side, "consolidated.00.pth"), 10, ["00.pth", "convert_"]),
    "gguf": (lambda side: put(side, "model-Q4_K_M.gguf"), 10, ["Q4_K_M.gguf", "GGUF"]),
    "deepspeed": (
        lambda side: put(side, "zero_to_fp32.py", "latest", "global_step9/mp_rank_00.pt"),
        *(10, ["DeepSpeed", "zero_to_fp32.py"]),
    ),
    "deepspeed, states alone": (
        lambda side: put(side, "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        *(10, ["DeepSpeed", "zero_pp_rank_0"]),
    ),
    "fsdp": (
        lambda side: put(side, "pytorch_model_fsdp_0/__0_0.distcp", "training_args.bin"),
        *(10, ["__0_0.distcp", "accelerate merge-weights"]),
    ),
    "flax": (lambda side: put(side, "flax_model.msgpack"), 10, ["flax_model.msgpack"]),
    "pickles": (lambda side: put(side, "pytorch_model.bin"), 16, ["(pytorch_model.bin)"]),
    "pickled shards": (
        lambda side: put(side, "pytorch_model-00001-of-00002.bin", "optimizer.pt"),
        *(16, ["(pytorch_model-00001-of-00002.bin)"]),
    ),
    "training alone": (
        lambda side: put(side, "training_args.bin", "optimizer.pt", "rng_state_0.pth"),
        *(10, ["neither model.safetensors nor", "config.json"]),
    ),
    "deeper": (deeper("model"), 10, ["lie deeper", "side/model."]),
    "checkpoints": (
        deeper("checkpoint-100", "checkpoint-200"),
        *(10, ["side/checkpoint-100, ", "side/checkpoint-200."]),
    ),
    "far deeper": (deeper("a/b"), 10, ["side/a/b."]),
}


@pytest.mark.parametrize("side", ["base", "unlearned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_elsewhere_are_named(
    layout: str, side: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay, status, says = LAYOUTS[layout]
    lay(pair / side)
    words = [str(pair / "base"), str(pair / "unlearned"), "--output", "out", "--quiet"]
    assert main(["sanitize", *words, "--retain", str(pair / "retain.jsonl")]) == status
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    for word in says:
        assert word.replace("side/", f"{side}/") in sentence
    assert not Path("out").exists()


def test_a_release_of_folders_of_a_repo_is_that_of_the_folders(
    hub: LoopbackHub, pair: Path
) -> None:
    files = {
        f"{side}/v1/{file.name}": file
        for side in ("base", "unlearned")
        for file in (pair / side).iterdir()
    }
    sha = hub.add_repo("org/all", files)
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    local = ["sanitize", str(pair / "base"), str(pair / "unlearned"), *retain]
    assert main([*local, "--output", "local"]) == 0
    sides = ["org/all/base/v1", f"org/all/unlearned/v1@{sha}"]
    for extra in ([], ["--low-disk"]):
        to = ["--to", f"org/release{len(extra)}", "--yes"]
        assert main(["push", *sides, *retain, *to, *extra]) == 0
        found = hub.files(f"org/release{len(extra)}")
        for name in sorted(p.name for p in Path("local").glob("*.safetensors")):
            assert found[name] == (Path("local") / name).read_bytes()
        card = ModelCard(found["README.md"].decode())
        assert card.data.base_model == ["org/all", "org/all"]
        sources = json.loads(found["sage/manifest.json"])["sources"]
        assert sources["unlearned"]["name"] == "org/all/unlearned/v1"
        assert sources["unlearned"]["commit"] == sha
    assert main(["verify", "org/release0"]) == 0
    assert main(["push", *sides, *retain, "--yes"]) == 0
    assert "model.safetensors.index.json" in hub.files("org/all-unlearned-v1-sage")


def test_a_folder_that_a_repo_has_not(
    on_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sanitize", "org/base/sub", "org/unlearned", "--output", "out"]) == 10
    assert "org/base has no folder 'sub'" in capsys.readouterr().err


def test_a_target_is_no_folder_of_a_repo(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl"), "--yes"]
    assert main(["push", *words, "--to", "org/target/sub", "--quiet"]) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_folders_of_a_repo_that_have_weights_are_named(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/all", {f"x/y/{f.name}": f for f in (pair / "base").iterdir()})
    assert main(["stats", "org/all", "--output", "st"]) == 10
    assert "org/all/x/y." in capsys.readouterr().err


def test_the_branches_that_have_weights_are_named(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sha = hub.add_repo("org/all", {"README.md": b"See the branches."})
    repo = hub.repos["model", "org/all"]
    for branch in ("checkpoint-1", "checkpoint-2", "notes"):
        repo.refs[f"refs/heads/{branch}"] = sha
    for branch in ("checkpoint-1", "checkpoint-2"):
        hub.add_commit("org/all", pair / "base", revision=branch)
    assert main(["stats", "org/all", "--output", "st"]) == 10
    sentence = capsys.readouterr().err
    assert "org/all@checkpoint-1, org/all@checkpoint-2." in sentence
    assert "notes" not in sentence
    words = ["org/all@checkpoint-2", "--retain", str(pair / "retain.jsonl"), "--output", "st"]
    assert main(["stats", *words, "--quiet"]) == 0


def test_a_repo_with_a_readme_alone(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("org/all", {"README.md": b"Weights follow."})
    assert main(["stats", "org/all", "--output", "st"]) == 10
    assert "only .gitattributes, README.md; pass" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, repo, below, revision",
    [
        ("org/name", "org/name", "", None),
        ("gpt2", "gpt2", "", None),
        ("org/name/sub@v1", "org/name", "sub", "v1"),
        ("org/name/a/b.c-d", "org/name", "a/b.c-d", None),
        ("org/name/", "org/name", "", None),
        ("org/name/sub/@refs/pr/1", "org/name", "sub", "refs/pr/1"),
    ],
)
def test_a_place_on_the_hub(text: str, repo: str, below: str, revision: str | None) -> None:
    found = parse_location(text)
    assert (found.repo, found.below, found.revision) == (repo, below, revision)


@pytest.mark.parametrize("text", ["org/../name", "a/b/..", "a//b", "org/name/sub@", "a b/c"])
def test_no_place(text: str) -> None:
    with pytest.raises(UsageError):
        parse_location(text)
