"""What comes along is read before any work, as the ecosystem will read it of the release."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from sage_hub.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from sage_hub.checkpoint.architecture import quiet_transformers
from sage_hub.checkpoint.files import Files, is_lfs_pointer
from sage_hub.checkpoint.index import TOKENIZER_FILES, Checkpoint
from sage_hub.checkpoint.merged import Merged
from sage_hub.errors import CorruptCheckpointError, SageHubError, first_line
from sage_hub.repair.belongs import KNOWN, belongs, code_of
from sage_hub.repair.plan import Plan
from sage_hub.runtime.limits import limited

BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def unreadable(plan: Plan) -> Iterator[SageHubError]:
    """An error for each file that comes along, or is used of the base, and cannot be read."""
    base, unlearned = plan.base, plan.unlearned
    used = ("generation_config.json", *TOKENIZER_FILES)
    broken = list(_of_side("base", base, [name for name in used if name in base.files.sizes]))
    broken += _of_side("unlearned", unlearned, plan.carried)
    yield from broken
    if broken or isinstance(unlearned, Merged):  # the parts of which were read on their own
        return
    if why := tokenizer_fault(unlearned.files, unlearned.tokenizer_folder):
        yield CorruptCheckpointError(
            f"The tokenizer of the unlearned side ({unlearned.name}) cannot be loaded, and neither "
            f"could the release's; save it again, or remove its files there: {why}"
        )


def _of_side(side: str, checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[SageHubError]:
    code = code_of(checkpoint.files)
    for name in names:
        try:
            content = checkpoint.files.path(name).read_bytes()
        except SageHubError as error:
            yield error
            continue
        read = belongs(name) or name in code or name == ADAPTER_CONFIG
        if why := fault(name if read else "", content):
            yield CorruptCheckpointError(f"{name} of the {side} side ({checkpoint.name}) {why}.")


def fault(name: str, content: bytes) -> str | None:
    """What is wrong with a file of this name, and what to do; None if it can be read."""
    if is_lfs_pointer(content):
        return "is a Git LFS pointer, and not the file; fetch that with `git lfs pull`"
    read = _reader(name)
    if read is None:
        return None
    if content.startswith(BYTE_ORDER_MARKS) and not name.endswith(".py"):
        return "begins with a byte order mark, which nobody expects; save it as UTF-8 without one"
    try:
        with limited():  # what is constant in a template is worked out as it is read
            read(content.decode("utf-8-sig"))
    except Exception as error:  # each reader has errors of its own
        return f"cannot be read ({first_line(error)}); save it again, or remove it if not needed"
    return None


def _reader(name: str) -> Callable[[str], object] | None:
    """What reads a file of this name; None for one that people read, or that holds no text."""
    if name == "tokenizer.json":
        return Tokenizer.from_str
    if name in KNOWN and name.endswith(".txt"):
        return str
    readers = {"json": _read_object, "jinja": _compile_jinja_template, "py": ast.parse}
    return readers.get(name.rpartition(".")[2])


def _read_object(text: str) -> None:
    if not isinstance(json.loads(text), dict):
        raise ValueError("it is not a JSON object")


def tokenizer_fault(files: Files, folder: Callable[[], Path]) -> str | None:
    """Why the tokenizer among `files`, which `folder` gives, cannot be loaded; None if it can.

    Only where no more is needed than transformers: other formats than tokenizer.json take packages
    that may be missing here, and code of the repo is not run.
    """
    if "tokenizer.json" not in files.sizes or code_of(files):
        return None
    try:
        with quiet_transformers():
            AutoTokenizer.from_pretrained(folder(), trust_remote_code=False)
    except ImportError:
        return None
    except SageHubError:
        raise
    except Exception as error:
        return first_line(error)
    return None
