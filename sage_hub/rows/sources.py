"""Where rows come from: a file, a Hub dataset, or the package."""

from __future__ import annotations

import codecs
import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.errors import NotFoundError, ProxyError, UsageError, first_line
from sage_hub.hub.client import ask, reading_token
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy

BUILTIN = Path(__file__).parents[1] / "data" / "general_proxy.jsonl"
BUILTIN_NAME = "sage-hub general-purpose proxy"
DATASET_SCHEME = "hf://datasets/"
READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
TEXT_COLUMNS = ("question", "answer", "prompt", "completion", "text")


def read_proxy(source: str | None) -> Proxy:
    """Read the proxy that `source` names; None is the general-purpose one in the package.

    `source` is a local .jsonl, .json, .csv, .parquet or .txt file, or
    `hf://datasets/org/name[@revision][/file][?config=NAME&split=NAME]`. Raises ProxyError with
    the line for a row that cannot be used, NotFoundError for a file that is not there.
    """
    if source is None:
        rows = parse_rows(_read_file(BUILTIN), BUILTIN_NAME)
        return Proxy(BUILTIN_NAME, rows, builtin=True)
    if source.startswith(DATASET_SCHEME):
        return _read_dataset(source)
    path = Path(source).expanduser()
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise NotFoundError(
            f"The proxy file {source} {wrong} (a Hub dataset is written {DATASET_SCHEME}org/name)."
        )
    return Proxy(path.name, parse_rows(_read_file(path), path.name))


def _read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix not in READERS:
        raise ProxyError(
            f"{path.name} has an unknown format; use one of {', '.join(READERS)} "
            "(or the name of a Hub dataset)."
        )
    if path.stat().st_size == 0:
        raise ProxyError(f"{path.name} is empty.")
    reader = READERS[path.suffix]
    if reader == "json":
        yield from _read_json(path)
        return
    # A word is a word: neither a number nor a missing value, whatever it looks like.
    options: dict[str, Any] = {}
    if reader == "csv":
        options = {"keep_default_na": False, "converters": dict.fromkeys(TEXT_COLUMNS, str)}
    elif reader == "text":
        options = {"encoding": "utf-8-sig"}  # as Windows editors write it
    try:
        for record in _load(reader, data_files=glob.escape(str(path)), split="train", **options):
            if reader != "text" or record["text"].strip():  # a text file has a row a line
                yield record
    except Exception as error:
        raise ProxyError(f"{path.name} cannot be read: {_reason(error, path)}") from None


def _read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    """JSON Lines, or one array of objects.

    Not by `datasets`, which makes a date of text that looks like one and knows no line numbers.
    """
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # as Windows editors write it
    if raw.lstrip()[:1] == b"[":
        yield from _parse_array(raw, path.name)
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ProxyError(f"{path.name}, line {number}: not a JSON object.")
            yield record


def _parse_array(raw: bytes, name: str) -> Iterator[Mapping[str, Any]]:
    try:
        records = json.loads(raw)
        json.dumps(records, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ProxyError(f"{name}, line {error.lineno}: not valid JSON.") from None
    except (ValueError, RecursionError):
        raise ProxyError(f"{name} is not valid JSON.") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ProxyError(f"{name}, row {number}: not a JSON object.")
        yield record


def _load(*args: Any, **kwargs: Any) -> Iterator[Mapping[str, Any]]:
    import datasets

    with _silent_datasets():
        # Streaming reads in place; the other way would leave a converted copy in the cache.
        yield from datasets.load_dataset(*args, streaming=True, **kwargs)


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """The library logs what it also raises, and the caller says it in one sentence."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _reason(error: Exception, path: Path) -> str:
    """The first line of a library's error, without the path of this machine."""
    return first_line(error).replace(str(path), path.name)


def _read_dataset(source: str) -> Proxy:
    match = re.fullmatch(
        r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/?]+))?(/(?P<file>[^?]+))?(\?(?P<query>.*))?",
        source.removeprefix(DATASET_SCHEME),
    )
    query = dict(parse_qsl(match["query"] or "")) if match else {}
    if match is None or query.keys() - {"config", "split"}:
        raise UsageError(
            f"{source!r} is not a dataset address; write "
            f"{DATASET_SCHEME}org/name[@revision][/file][?config=NAME&split=NAME]."
        )
    repo, revision = match["repo"], match["revision"]
    files = HubFiles(repo, revision, kind="dataset")
    name = source.replace(f"@{revision}", "") if revision else source
    try:
        records = _load_dataset(
            files, query.get("config"), match["file"], query.get("split", "train")
        )
    except (ValueError, OSError) as error:
        said = re.sub(r"\S*/snapshots/\w+/", "", first_line(error))  # of this machine
        raise ProxyError(f"{name} cannot be read: {said}") from None
    return Proxy(name, parse_rows(records, name), revision=files.commit)


def _load_dataset(
    files: HubFiles, config: str | None, file: str | None, split: str
) -> list[Mapping[str, Any]]:
    """The records of a split, of the files that the dataset's own rules name for it.

    Raises ValueError or OSError as `datasets` does.
    """
    import datasets

    with _silent_datasets():
        builder = ask(
            f"dataset {files.name}",
            lambda: datasets.load_dataset_builder(
                files.name, config, revision=files.commit, data_files=file, token=reading_token()
            ),
        )
        found = builder.config.data_files or {}
        if split not in found:
            raise ValueError(f"it has no split {split!r}, but {', '.join(found) or 'none'}")
        # The library would read from the Hub directly, and compare nothing with its hashes.
        names = [url.partition(f"@{files.commit}/")[2] for url in found[split]]
        builder.config.data_files = {split: [str(files.path(name)) for name in names]}
        return list(builder.as_streaming_dataset(split))
