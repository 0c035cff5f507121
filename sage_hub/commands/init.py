"""`sage-hub init`: a sage.yaml for a pair, with what was found of it and what to decide."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.merged import Merged
from sage_hub.checkpoint.pair import Pair, open_pair
from sage_hub.commands.guesses import guesses
from sage_hub.errors import NotFoundError, SageHubError, TargetError, printable
from sage_hub.model.compute import name_of
from sage_hub.rows.encoding import load_tokenizer, row_limit
from sage_hub.runtime.progress import in_bytes
from sage_hub.settings import SETTINGS, Settings

CONFIG = "sage.yaml"
SETS = {
    "retain": "what must be kept; without it the base writes rows itself",
    "forget": "what must go; without it forgetting is not measured",
    "heldout": "retained knowledge that is not among the retain rows, to evaluate on",
}
NO_LIMIT = 1 << 62
GATES = ("retain_recovered >= 0.5", "forget.probability <= unlearned + 0.05")
HEAD = """\
# Settings of sage-hub for this pair. The command line wins over them, docs/settings.md has them
# all, and paths are relative to this file. A line that begins with "# " and the name of a setting
# is a proposal: take the "# " away where it is right."""


def write_config(
    base: str, unlearned: str, settings: Settings, file: Path, *, force: bool = False
) -> dict[str, Any]:
    """Write a settings file for this pair; what was found of the pair, and the next command.

    Raises TargetError if there is a file already, and whatever keeps the pair from being opened.
    """
    if not file.parent.is_dir():
        raise NotFoundError(f"--output {file}: there is no folder {file.parent}.")
    if file.is_dir() or (file.exists() and not force):
        raise TargetError(
            f"{file} is there already; choose another --output, or replace it with --force."
        )
    pair = open_pair(base, unlearned, merge=settings.merge, pickled=settings.pickled_weights)
    reading = pair.base.reading_with(settings.tokenizer, [pair.unlearned])
    found = {**_sides(pair), "tokenizer": _tokenizer(reading)}
    given = {n: value for n, value in vars(settings).items() if value != SETTINGS[n].default}
    file.write_text("\n".join([*_lines(pair, found, given, file), ""]), encoding="utf-8")
    next_words = ["sage-hub", "push", base, unlearned, "--dry-run"]
    if file != Path(CONFIG):
        next_words += ["--config", str(file)]
    return {"file": str(file), **found, "next": shlex.join(next_words)}


def _sides(pair: Pair) -> dict[str, Any]:
    base, unlearned = pair.base, pair.unlearned
    kind = "a whole model"
    if isinstance(unlearned, (Adapter, Merged)):
        kind = "a LoRA adapter, to be merged" if isinstance(unlearned, Merged) else "a LoRA adapter"
    return {
        "base": _at(base),
        "unlearned": _at(unlearned),
        "kind": kind,
        "model_type": base.architecture.model_type,
        "parameters": sum(math.prod(base.info(tensor).shape) for tensor in base.shard_of),
        "sizes": {side: one.weight_bytes for side, one in pair.sides.items()},
        "shards": {side: len(one.shards) for side, one in pair.sides.items()},
        "dtype": {side: name_of(one.architecture.dtype) for side, one in pair.sides.items()},
        "context": None if (context := row_limit(base, NO_LIMIT)) == NO_LIMIT else context,
    }


def _at(side: Checkpoint) -> str:
    """A side with its commit; a folder by its own name, as a file of settings may be published."""
    return f"{side.name}@{side.commit}" if side.commit else side.name


def _tokenizer(reading: Checkpoint) -> dict[str, Any] | None:
    """Whose tokenizer makes tokens of rows; None if there is none that loads."""
    if not reading.tokenizer_files:
        return None
    try:
        template = load_tokenizer(reading).chat_template
    except SageHubError:
        return None
    names = sorted(template) if isinstance(template, Mapping) else []
    return {"of": reading.read_from.name, "chat_template": names or template is not None}


def _lines(
    pair: Pair, found: Mapping[str, Any], given: Mapping[str, Any], file: Path
) -> Iterator[str]:
    """The file, line by line: nothing of what the pair says is more than a comment."""
    yield from (HEAD, "#")
    yield from (f"#   {printable(line)}" for line in _about(found))
    if CONFIG in pair.unlearned.files.sizes:
        yield f"# The unlearned side has a {CONFIG} of its own, which this one takes the place of."
    if given:
        yield from ("", "# As it was said to `sage-hub init`:", *_yaml(given))
    yield from ("", "# The sets. `sage-hub data` shows how their rows will be read.")
    yield from (f"#   {which}: {what}" for which, what in SETS.items())
    proposed: set[str] = set()
    for guess in guesses(pair, file.parent):
        yield from ("#", f"# {guess.why}")
        yield from (f"# {line}" for line in _yaml(guess.values))
        proposed |= guess.values.keys()
    if left := [which for which in SETS if which not in proposed]:
        yield from ("#", "# Rows of your own.")
        yield from (f"# {line}" for line in _yaml({which: f"{which}.jsonl" for which in left}))
    yield from ("", "# What the release must meet to be published. The numbers are examples: take")
    yield "# yours from a first run without gates, wider than its intervals (docs/guidelines.md)."
    yield from (f"# {line}" for line in _yaml({"gates": list(GATES)}))
    yield from ("", "# Memory in GB that calibration and evaluation may take.")
    yield from (f"# {line}" for line in _yaml({"memory": SETTINGS["memory"].default}))
    if found["tokenizer"] is None and "tokenizer" not in given:
        yield from (
            "",
            "# Neither side has a tokenizer that loads: name a repo or folder with one.",
        )
        yield "# tokenizer: org/name"


def _about(found: Mapping[str, Any]) -> Iterator[str]:
    sizes, shards, dtypes = found["sizes"], found["shards"], found["dtype"]
    for side in ("base", "unlearned"):
        kind = f", {found['kind']}" if side == "unlearned" else ""
        count = "1 file" if shards[side] == 1 else f"{shards[side]} files"
        yield f"{side}: {found[side]}{kind}, {in_bytes(sizes[side])} in {count}, {dtypes[side]}"
    context = f", {found['context']} tokens of context" if found["context"] else ""
    yield f"model: {found['model_type']}, {found['parameters']:,} parameters{context}"
    tokenizer = found["tokenizer"]
    if tokenizer is None:
        yield "tokenizer: none that loads"
        return
    template = tokenizer["chat_template"]
    if isinstance(template, list):
        said = f"chat templates {', '.join(template)} (template: NAME takes one)"
    else:
        said = "with a chat template" if template else "without a chat template"
    yield f"tokenizer: of {tokenizer['of']}, {said}"


def _yaml(values: Mapping[str, Any]) -> Sequence[str]:
    """These settings as lines of a settings file; a list is on one line, as one "# " hides it."""
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            lines.append(f"{name}: {json.dumps([*value], ensure_ascii=False)}")
        else:
            text = yaml.safe_dump(
                {name: value}, sort_keys=False, allow_unicode=True, width=math.inf
            )
            lines += text.rstrip("\n").split("\n")
    return lines
