"""Which files belong to a model: what the ecosystem reads, the code that it names, licences."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from sage_hub.checkpoint.files import Files

# The vocabularies of transformers' tokenizers, whatever their age, and of mistral-common.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "tiktoken.model"),
    *("sentencepiece.bpe.model", "source.spm", "target.spm", "vocab-src.json", "vocab-tgt.json"),
    *("target_vocab.json", "bpe.codes", "dict.txt", "byte_maps.json", "emoji.json"),
    *("entity_vocab.json", "normalizer.json", "prophetnet.tokenizer", "word_pronunciation.json"),
    "word_shape.json",
)
CONFIGS = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
KNOWN = frozenset((*VOCABULARIES, *CONFIGS, *TEMPLATES))
KINDS = re.compile(
    r"[\w-]+\.tiktoken|tokenizer\.model\.v\d+(m\d+)?|additional_chat_templates/[\w.-]+\.jinja"
)
_NOTICE = r"licen[cs]es?|notices?|copying|copyright|terms(_of_use)?|(acceptable[-_])?use[-_]policy"
NOTICES = re.compile(
    rf"((model|code|third[-_]party)[-_])?({_NOTICE})([-_][\w-]+)?(\.(md|txt|rst|html|pdf))?",
    re.IGNORECASE,
)


def belongs(name: str) -> bool:
    """Whether a file of this name is known to belong to a model, its code aside."""
    return name in KNOWN or bool(KINDS.fullmatch(name) or NOTICES.fullmatch(name))


def code_of(files: Files) -> set[str]:
    """The code that the configs among `files` name in `auto_map`, and what that imports of it."""
    todo = [module for name in KNOWN for module in _named_code(files, name)]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name in files.sizes and name not in found:
            found.add(name)
            todo += _imports(files, name)
    return found


def _named_code(files: Files, config: str) -> Iterator[str]:
    if not config.endswith("config.json") or config not in files.sizes:
        return
    try:
        said: Any = json.loads(files.path(config).read_text(encoding="utf-8"))
        classes = list(said.get("auto_map", {}).values())
    except (ValueError, AttributeError, RecursionError):
        return  # a broken file is told of where all are read
    for entry in classes:
        for one in entry if isinstance(entry, list) else [entry]:
            if isinstance(one, str) and "--" not in one:  # that is code of another repo
                yield one.rpartition(".")[0].replace(".", "/") + ".py"


def _imports(files: Files, module: str) -> Iterator[str]:
    """The files that `module` imports relatively, as far as they could be there."""
    try:
        tree = ast.parse(files.path(module).read_bytes())
    except (ValueError, SyntaxError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = [PurePosixPath(module), *PurePosixPath(module).parents]
            if node.level >= len(above):
                continue
            place = above[node.level].joinpath(*(node.module or "").split("."))
            for path in (place, *(place / alias.name for alias in node.names)):
                yield f"{path}.py"
                yield f"{path}/__init__.py"
