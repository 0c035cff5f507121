"""Files of text to records: JSON in lines or as one array, CSV, and lines of plain text."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sage_hub.errors import ProxyError, first_line
from sage_hub.rows.forms import Placed

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, name: str) -> None:
    """Raise ProxyError if `path` only points to a file that Git LFS keeps elsewhere."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ProxyError(
                f"{name} is a Git LFS pointer, not the file that it stands for; run `git lfs pull` "
                "in its folder first."
            )


def read_text(path: Path, name: str) -> str:
    """The text of a file, in gzip or not, in UTF-8, UTF-16 or UTF-32."""
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ProxyError(f"{name} cannot be unpacked: {first_line(error)}") from None
    # By a byte order mark, else by where the first bytes are zero: true of any text that begins
    # with a letter or a bracket.
    encoding = json.detect_encoding(raw)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ProxyError(f"{name}, line {line}: not text in UTF-8 or UTF-16.") from None


def _read_json(text: str, name: str) -> Iterator[Placed]:
    """One array of objects, or objects one after the other, on a line each or on several.

    Not by `datasets`, which makes a date of text that looks like one and knows no line numbers.
    """
    if text.lstrip()[:1] == "[":
        yield from _read_array(text, name)
        return
    decoder, line, seen, start = json.JSONDecoder(), 1, 0, _skip(text, 0)
    while start < len(text):
        line, seen = line + text.count("\n", seen, start), start
        try:
            record, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            record = None
        if not _is_object(record):
            raise ProxyError(f"{name}, line {line}: not a JSON object.")
        yield line, record
        start = _skip(text, stop)


def _skip(text: str, start: int) -> int:
    """The place of the next character that is no white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _read_array(text: str, name: str) -> Iterator[Placed]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ProxyError(f"{name}, line {error.lineno}: not valid JSON.") from None
    except (ValueError, RecursionError):
        raise ProxyError(f"{name} is not valid JSON.") from None
    for number, record in enumerate(records, 1):
        if not _is_object(record):
            raise ProxyError(f"{name}, row {number}: not a JSON object.")
        yield None, record


def _is_object(record: Any) -> bool:
    """Whether it is an object, and all of its text is text: half a surrogate pair is none."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict)


def _read_csv(text: str, name: str) -> Iterator[Placed]:
    import pandas  # takes half a second

    try:
        # A word is a word: neither a number nor a missing value, whatever it looks like.
        table = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        table = table.fillna("")  # a row that is short of cells
    except Exception as error:
        raise ProxyError(f"{name} cannot be read: {first_line(error)}") from None
    for record in table.to_dict("records"):
        yield None, record


def _read_lines(text: str, name: str) -> Iterator[Placed]:
    """A row a line, and none for a blank one."""
    for number, line in enumerate(io.StringIO(text, newline=None).read().split("\n"), 1):
        if line.strip():
            yield number, {"text": line}


Reader = Callable[[str, str], Iterator[Placed]]
TEXT_READERS: Mapping[str, Reader] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_lines,
}
