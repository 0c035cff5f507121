"""What happens to checkpoints and rows on their way to us, as changes of a pico pair in a folder.

`MISHAPS` maps a name to the change and to the status that the plan ends with (0: none is refused).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.pico import make_rows, write_rows

INDEX = "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
Change = Callable[[Path], None]


def remap(side: Path, names: Callable[[str], str | None]) -> None:
    """Rewrite every shard and the index name by name; None drops the tensor."""
    index = json.loads((side / INDEX).read_text())
    index["weight_map"] = {}
    for file in side.glob("*.safetensors"):
        tensors = {new: t for old, t in load_file(file).items() if (new := names(old)) is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
    (side / INDEX).write_text(json.dumps(index))


def change(side: Path, how: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for file in side.glob("*.safetensors"):
        tensors = {name: how(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rows(pair: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (pair / "retain.jsonl").read_text().splitlines()]


def on_both(do: Callable[[Path], None]) -> Change:
    def both(pair: Path) -> None:
        for side in ("base", "unlearned"):
            do(pair / side)

    return both


def on(side: str, do: Callable[[Path], None]) -> Change:
    return lambda pair: do(pair / side)


def without(*parts: str) -> Callable[[Path], None]:
    return lambda side: remap(side, lambda n: None if any(part in n for part in parts) else n)


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda side: remap(side, lambda name: prefix + name)


def with_template(template: str) -> Callable[[Path], None]:
    return lambda side: (side / "chat_template.jinja").write_text(template) and None


def with_file(name: str, content: bytes | str = b"x") -> Callable[[Path], None]:
    def add(side: Path) -> None:
        path = side / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return add


def with_rows(how: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Change:
    def rewrite(pair: Path) -> None:
        changed = [how(number, row) for number, row in enumerate(rows(pair))]
        write_rows(pair / "retain.jsonl", changed)

    return rewrite


def row_bytes(encode: Callable[[str], bytes]) -> Change:
    def rewrite(pair: Path) -> None:
        file = pair / "retain.jsonl"
        file.write_bytes(encode(file.read_text()))

    return rewrite


def bom(name: str) -> Callable[[Path], None]:
    return lambda side: with_file(name, b"\xef\xbb\xbf" + (side / name).read_bytes())(side)


def emptied(side: Path) -> None:
    change(side, lambda name, tensor: torch.empty(0) if name == WEIGHT else tensor)


def in_unknown_type(side: Path) -> None:
    change(side, lambda name, t: t.view(torch.uint8).view(torch.uint32) if name == WEIGHT else t)
    edit(side / "config.json", quantization={"bits": 4, "group_size": 64})


PARTS = (
    "{% for m in messages %}<{{ m.role }}> {% for c in m.content if c.type == 'text' %}"
    "{{ c.text }}{% endfor %} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MUTE = "{% for m in messages if m.role == 'user' %}<user> {{ m.content }} <end> {% endfor %}"
FIRST = "<user> {{ messages[0].content }} <end> <assistant> "
BROKEN = "{{ messages[0].content + 1 }}"

MISHAPS: Mapping[str, tuple[Change, int]] = {
    "both without a head": (on_both(without("lm_head")), 13),
    "head under another name": (
        on_both(lambda side: remap(side, lambda n: n.replace("lm_head", "output"))),
        13,
    ),
    "both without up_proj": (on_both(without("mlp.up_proj")), 13),
    "one weight less": (on("unlearned", without(WEIGHT)), 13),
    "an unknown prefix": (on_both(prefixed("wrapped.")), 13),
    "torch.compile's prefix": (on_both(prefixed("_orig_mod.")), 0),
    "an empty tensor": (on("unlearned", emptied), 13),
    "layers that are not there": (
        on_both(lambda side: edit(side / "config.json", num_hidden_layers=5)),
        13,
    ),
    "MLX 4-bit": (on("unlearned", in_unknown_type), 20),
    "quantized text part": (
        on_both(
            lambda side: edit(
                side / "config.json", text_config={"quantization_config": {"quant_method": "fp8"}}
            )
        ),
        20,
    ),
    "an index with strange metadata": (on("unlearned", lambda s: edit(s / INDEX, metadata=[1])), 0),
    "a left adapter_config.json": (on("unlearned", with_file("adapter_config.json", "{}")), 0),
    "weights in other containers": (
        on(
            "unlearned",
            lambda s: [with_file(n)(s) for n in ("__0_0.distcp", "m.tar.zst", "a.gguf")] and None,
        ),
        0,
    ),
    "the forget set beside it": (on("unlearned", with_file("forget.json", "[]")), 0),
    "a tokenizer with a byte order mark": (on("unlearned", bom("tokenizer.json")), 17),
    "a config with a byte order mark": (on("base", bom("config.json")), 17),
    "a broken generation config": (on("base", with_file("generation_config.json", "{")), 17),
    "a card in UTF-16": (
        on("unlearned", with_file("README.md", "---\nlicense: mit\n---\n".encode("utf-16"))),
        0,
    ),
    "a template of parts": (on_both(with_template(PARTS)), 0),
    "a template without answers": (on_both(with_template(MUTE)), 18),
    "a template of the first message": (on_both(with_template(FIRST)), 18),
    "a template that raises": (on_both(with_template(BROKEN)), 18),
    "a template that is a pointer": (on_both(with_template(LFS)), 18),
    "rows that are a pointer": (row_bytes(lambda _: LFS.encode()), 18),
    "rows in UTF-16": (row_bytes(lambda text: text.encode("utf-16")), 0),
    "rows with a byte order mark": (row_bytes(lambda text: b"\xef\xbb\xbf" + text.encode()), 0),
    "rows in gzip, by mistake": (row_bytes(lambda text: gzip.compress(text.encode())), 18),
    "indented rows": (
        lambda pair: (
            (pair / "retain.jsonl").write_text(
                "\n".join(json.dumps(row, indent=2) for row in rows(pair))
            )
            and None
        ),
        0,
    ),
    "rows of two forms": (
        with_rows(
            lambda n, row: row if n % 2 else {**row, "choices": [row["answer"], "w1"], "answer": 0}
        ),
        18,
    ),
    "wrong answers as a text": (with_rows(lambda _, row: row | {"perturbed_answer": "w3 w4"}), 0),
    "wrong answers as a number": (with_rows(lambda _, row: row | {"perturbed_answer": 1912}), 0),
    "wrong answers as numbers": (
        with_rows(lambda _, row: row | {"perturbed_answer": [1, "w3"]}),
        0,
    ),
    "null columns": (with_rows(lambda _, row: row | {"choices": None, "text": None}), 0),
    "conversations": (
        with_rows(
            lambda _, row: {
                "conversations": [
                    {"from": "human", "value": row["question"]},
                    {"from": "gpt", "value": row["answer"]},
                ]
            }
        ),
        0,
    ),
    "instruction and output": (
        with_rows(lambda _, row: {"instruction": row["question"], "output": row["answer"]}),
        0,
    ),
    "prompt and response": (
        with_rows(lambda _, row: {"prompt": row["question"], "response": row["answer"]}),
        0,
    ),
    "a head that ran away": (
        on("unlearned", lambda s: change(s, lambda n, t: t * 1000 if "lm_head" in n else t)),
        0,
    ),
    "one row twice": (
        lambda pair: write_rows(pair / "forget.jsonl", make_rows(40, seed=0)) and None,
        19,
    ),
}
