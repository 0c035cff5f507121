"""A small copy of each layout in which unlearned models are released on the Hub.

Each goes through `sanitize` and `push`; the weights equal the float64 reference, and transformers
or PEFT loads the release.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.architectures import load, make_model, move, reference
from support.loopback_hub import LoopbackHub
from support.pico import make_rows, make_tokenizer, write_rows
from transformers import PreTrainedModel

from sage_hub.cli.main import main


@dataclass
class Exhibit:
    """A pair as it lies on the Hub: org/base and org/unlearned, and how they are named."""

    folder: Path
    base: str = "org/base"
    unlearned: str = "org/unlearned"
    options: list[str] = field(default_factory=list)
    exact: bool = True  # run and stored in float32
    adapter: bool = False

    def side(self, name: str) -> Path:
        """What is uploaded as org/NAME."""
        return self.folder / name

    def clean(self, name: str) -> Path:
        """The same model, as `save_pretrained` writes it."""
        return self.folder / "clean" / name


def save(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    size: str = "50GB",
    tokenizer: bool = True,
) -> None:
    make = type(model).from_pretrained
    own = make(None, config=model.config, state_dict=model.state_dict(), dtype=dtype)
    own.save_pretrained(folder, max_shard_size=size)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)


def pair(
    folder: Path,
    name: str,
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    sizes: tuple[str, str] = ("50GB", "50GB"),
    tokenizers: tuple[bool, bool] = (True, True),
) -> Exhibit:
    """Save both sides, and the clean copies of what was stored."""
    found = Exhibit(folder, exact=types == (torch.float32, torch.float32))
    model = make_model(name)
    for place, side in enumerate(("base", "unlearned")):
        if side == "unlearned":
            move(model)
        dtype, size, tokenizer = types[place], sizes[place], tokenizers[place]
        save(model, found.side(side), dtype, size=size, tokenizer=tokenizer)
        shutil.copytree(found.side(side), found.clean(side))
        make_tokenizer().save_pretrained(found.clean(side))
    return found


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))


def tofu(folder: Path) -> Exhibit:
    """open-unlearning: bfloat16, tied, a card without a base, a long name."""
    found = pair(folder, "Gemma3Text", (torch.bfloat16, torch.bfloat16))
    (found.side("unlearned") / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    long = "unlearn_tofu_Llama-3.2-1B-Instruct_forget10_NPO_lr1e-05_beta0.1_alpha1_epoch5"
    shutil.move(found.side("unlearned"), found.side(long))
    found.unlearned = f"org/{long}"
    return found


def muse(folder: Path) -> Exhibit:
    """OPTML-Group/SimNPO-MUSE: bfloat16 on a float32 base, in shards, no tokenizer anywhere."""
    types, sizes = (torch.float32, torch.bfloat16), ("30KB", "15KB")
    found = pair(folder, "Llama", types, sizes, (False, False))
    make_tokenizer().save_pretrained(found.side("words"))
    found.options = ["--tokenizer", "org/words"]
    return found


def zephyr(folder: Path) -> Exhibit:
    """OPTML-Group/SimNPO-WMDP: no tokenizer on the unlearned side, a private path in the config."""
    found = pair(folder, "Mistral", (torch.bfloat16, torch.bfloat16), tokenizers=(True, False))
    edit(found.side("unlearned") / "config.json", _name_or_path="/home/somebody/zephyr")
    return found


def wide(folder: Path) -> Exhibit:
    """saisasanky/zephyr_rmu, LLM-GAT: float32 on a bfloat16 base."""
    return pair(folder, "Llama", (torch.bfloat16, torch.float32))


def half(folder: Path) -> Exhibit:
    """9parthupman/audit-pid-8b-ckpts: a model in a sub-directory, stored as float16."""
    found = pair(folder, "Llama", (torch.bfloat16, torch.float16))
    shutil.move(found.side("unlearned"), folder / "kept")
    shutil.move(folder / "kept", found.side("unlearned") / "npo" / "step-100")
    found.unlearned = "org/unlearned/npo/step-100"
    return found


def subfolder(folder: Path) -> Exhibit:
    """zorache/example_unlearned_model: everything in one sub-folder."""
    found = pair(folder, "Qwen3")
    shutil.move(found.side("unlearned"), folder / "kept")
    shutil.move(folder / "kept", found.side("unlearned") / "model")
    found.unlearned = "org/unlearned/model"
    return found


def pickle(side: Path, most: int = 0) -> None:
    """Put the weights of `side` into pickles instead, in shards of `most` tensors if asked."""
    tensors = {name: value for name, value in load(side, dtype="auto").state_dict().items()}
    for file in side.glob("model*.safetensors*"):
        file.unlink()
    names, count = list(tensors), most or len(tensors)
    parts = [names[start : start + count] for start in range(0, len(names), count)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        shard = f"pytorch_model-{number:05}-of-{len(parts):05}.bin" if most else "pytorch_model.bin"
        torch.save({name: tensors[name] for name in part}, side / shard)
        weight_map |= dict.fromkeys(part, shard)
    if most:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (side / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def potter(folder: Path) -> Exhibit:
    """microsoft/Llama2-7b-WhoIsHarryPotter: float32, in one pytorch_model.bin."""
    found = pair(folder, "Llama")
    pickle(found.side("unlearned"))
    found.options = ["--pickled-weights"]
    return found


def old(folder: Path) -> Exhibit:
    """Both sides in shards of pickles, tied: the head is the embedding's tensor once more."""
    found = pair(folder, "Gemma3Text")
    for name in ("base", "unlearned"):
        pickle(found.side(name), most=7)
    found.options = ["--pickled-weights"]
    return found


def neox(folder: Path) -> Exhibit:
    """EleutherAI/deep-ignorance: GPT-NeoX."""
    return pair(folder, "GPTNeoX")


def olmo(folder: Path) -> Exhibit:
    """The SemEval models: OLMo in float32, no tokenizer, an empty README."""
    found = pair(folder, "Olmo2", tokenizers=(True, False))
    (found.side("unlearned") / "README.md").write_text("")
    return found


def lora(folder: Path) -> Exhibit:
    """baulab/elm-zephyr-7b-beta: an adapter tagged as transformers, with a tokenizer inside."""
    found = Exhibit(folder, adapter=True)
    base = make_model("Mistral")
    save(base, found.side("base"))
    shutil.copytree(found.side("base"), found.clean("base"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(found.side("unlearned"))
    make_tokenizer().save_pretrained(found.side("unlearned"))
    card = "---\nlibrary_name: transformers\ntags: [unlearning]\n---\n"
    (found.side("unlearned") / "README.md").write_text(card)
    merged = PeftModel.from_pretrained(load(found.side("base")), found.side("unlearned"))
    merged.merge_and_unload().save_pretrained(found.clean("unlearned"))
    return found


ZOO: list[Callable[[Path], Exhibit]] = [
    *(tofu, muse, zephyr, wide, half, subfolder, potter, old, neox, olmo, lora)
]


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_a_released_layout(
    make: Callable[[Path], Exhibit], hub: LoopbackHub, tmp_path: Path
) -> None:
    exhibit, rows = make(tmp_path / "zoo"), make_rows(40, seed=0)
    retain = str(write_rows(tmp_path / "retain.jsonl", rows))
    for side in (tmp_path / "zoo").iterdir():
        if side.name != "clean":
            hub.add_repo(f"org/{side.name}", side)
    words = [exhibit.base, exhibit.unlearned, "--retain", retain, "--quiet", *exhibit.options]
    words += ["--generate-rows", "0"]
    out = tmp_path / "out"
    assert main(["sanitize", *words, "--output", str(out)]) == 0
    expected = reference(exhibit.clean("base"), exhibit.clean("unlearned"), rows)
    found = opened(out, exhibit).state_dict()
    moved, changed = load(exhibit.clean("unlearned")).state_dict(), 0
    for name, tensor in expected.items():
        way = float((tensor - moved[name].double()).norm())  # that the filter goes
        missed = float((found[name].double() - tensor).norm())
        # The reference runs the base in float32, and rounds nothing.
        assert missed <= (1e-3 if exhibit.exact else 0.15) * way + 1e-6, name
        changed += way > 0
    assert changed >= 4

    assert main(["push", *words, "--to", "org/release", "--yes"]) == 0
    sent = hub.files("org/release")
    for file in out.glob("*.safetensors"):
        assert sent[file.name] == file.read_bytes()


def opened(out: Path, exhibit: Exhibit) -> PreTrainedModel:
    """The release as a user loads it."""
    if not exhibit.adapter:
        return load(out, dtype="auto")
    model = PeftModel.from_pretrained(load(exhibit.clean("base")), out)
    return model.merge_and_unload()
