"""Where rows come from: a file, a Hub dataset, or the package."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from sage_hub.checkpoint.files import check_name
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.errors import NotFoundError, ProxyError, SageHubError, UsageError, first_line
from sage_hub.hub.client import ask, explain_any, reading_token
from sage_hub.rows.forms import Placed, parse_placed, parse_rows, with_shots
from sage_hub.rows.proxies import Proxy
from sage_hub.rows.texts import TEXT_READERS, read_text, refuse_pointer

BUILTIN = Path(__file__).parents[1] / "data" / "general_proxy.jsonl"
BUILTIN_NAME = "sage-hub general-purpose proxy"
DATASET_SCHEME = "hf://datasets/"
FORMATS = (*TEXT_READERS, ".parquet")


def read_proxy(source: str | None) -> Proxy:
    """Read the proxy that `source` names; None is the general-purpose one in the package.

    `source` is a local file in one of FORMATS, of which those that are text may be in gzip, or
    `hf://datasets/org/name[@revision][/file][?config=NAME&split=NAME&shots=NAME]`; a split may be
    `NAME[first:last]` as in `datasets`, and `shots` is one whose questions and answers are shown
    before each of the others. Raises ProxyError with the line for a row that cannot be used,
    NotFoundError for a file that is not there.
    """
    if source is None:
        rows = parse_placed(_read_file(BUILTIN, BUILTIN.name), BUILTIN_NAME)
        return Proxy(BUILTIN_NAME, rows, builtin=True)
    if is_dataset(source):
        return _read_dataset(source)
    path = Path(source).expanduser()
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise NotFoundError(
            f"The proxy file {source} {wrong} (a Hub dataset is written {DATASET_SCHEME}org/name)."
        )
    check_name(path.name)
    return Proxy(path.name, parse_placed(_read_file(path, path.name), path.name))


def is_dataset(source: str) -> bool:
    """Whether `source` is on the Hub."""
    return source.startswith(DATASET_SCHEME)


def format_of(name: str) -> str:
    """The ending of a file's name that says how it is read, in small letters, without gzip's."""
    lower = name.lower()
    plain = lower.removesuffix(".gz")
    suffix = Path(plain).suffix
    return suffix if plain == lower or suffix in TEXT_READERS else ""


def _read_file(path: Path, name: str) -> Iterator[Placed]:
    """The records of the file `path`, called `name` in sentences."""
    kind = format_of(path.name)
    if kind not in FORMATS:
        raise ProxyError(
            f"{name} has an unknown format; use one of {', '.join(FORMATS)} "
            "(or the name of a Hub dataset)."
        )
    if path.stat().st_size == 0:
        raise ProxyError(f"{name} is empty.")
    refuse_pointer(path, name)
    if kind in TEXT_READERS:
        yield from TEXT_READERS[kind](read_text(path, name), name)
        return
    try:
        for record in _load("parquet", data_files=glob.escape(str(path)), split="train"):
            yield None, record
    except SageHubError:
        raise
    except Exception as error:
        said = first_line(error).replace(str(path), name)  # no path of this machine
        raise ProxyError(f"{name} cannot be read: {said}") from None


def _load(*args: Any, **kwargs: Any) -> Iterator[Any]:
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


# The revision as huggingface_hub's file system reads it: a pull request, a conversion by the Hub,
# which "~" abbreviates, or else all up to the next slash.
_ADDRESS = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/pr/\d+|refs/convert/[\w.-]+|[^/?]+))?"
    r"(/(?P<file>[^?]+))?(\?(?P<query>.*))?"
)


def at_commit(source: str, commit: str | None) -> str:
    """The address of a dataset at the `commit` that was read of it; what is no dataset stays."""
    match = _ADDRESS.fullmatch(source.removeprefix(DATASET_SCHEME))
    if commit is None or match is None or not source.startswith(DATASET_SCHEME):
        return source
    behind = match.end("revision") if match["revision"] else match.end("repo")
    return f"{DATASET_SCHEME}{match['repo']}@{commit}{match.string[behind:]}"


def _read_dataset(source: str) -> Proxy:
    match = _ADDRESS.fullmatch(source.removeprefix(DATASET_SCHEME))
    query = dict(parse_qsl(match["query"] or "")) if match else {}
    if match is None or query.keys() - {"config", "split", "shots"}:
        raise UsageError(
            f"{source!r} is not a dataset address; write "
            f"{DATASET_SCHEME}org/name[@revision][/file][?config=NAME&split=NAME&shots=NAME]."
        )
    revision = unquote(match["revision"]) if match["revision"] else None
    if revision and revision.startswith("~"):
        revision = f"refs/convert/{revision[1:]}"
    files = HubFiles(match["repo"], revision, kind="dataset")
    name = source.replace(f"@{match['revision']}", "", 1) if revision else source
    split, some = _part(query.get("split", "train"))
    file = match["file"]
    if file in files.sizes and format_of(file) in FORMATS and split == "train":
        rows = parse_placed(_read_file(files.path(file), name), name)
    else:
        rows = parse_rows(_load_split(files, query.get("config"), file, split, name), name)
    if shots := query.get("shots"):
        first = parse_rows(_load_split(files, query.get("config"), file, shots, name), name)
        rows = with_shots(rows, first, name)
    if not rows[some]:
        raise ProxyError(f"{name} has {len(rows)} rows, and none in that part.")
    return Proxy(name, rows[some], revision=files.commit)


def _part(split: str) -> tuple[str, slice]:
    """The name of a split, and which of its rows are meant."""
    if match := re.fullmatch(r"(?P<name>.+)\[(?P<first>\d*):(?P<last>\d*)\]", split):
        first, last = (int(match[end]) if match[end] else None for end in ("first", "last"))
        return match["name"], slice(first, last)
    return split, slice(None)


def _load_split(
    files: HubFiles, config: str | None, file: str | None, split: str, name: str
) -> list[Any]:
    """The records of a split, of the files that the dataset's own rules name for it.

    Raises ProxyError for what `datasets` cannot make of them.
    """
    import datasets

    try:
        with _silent_datasets():
            builder = ask(
                f"dataset {files.name}",
                lambda: datasets.load_dataset_builder(
                    files.name,
                    config,
                    revision=files.commit,
                    data_files=file,
                    token=reading_token(),
                ),
            )
            found = {str(key): urls for key, urls in (builder.config.data_files or {}).items()}
            if split not in found:
                there = ", ".join(found) or "none"
                raise ProxyError(
                    f"{name}: the dataset has no split {split!r}; give one that it has with "
                    f"?split=NAME, whole ({there})."
                )
            # The library would read from the Hub directly, and compare nothing with its hashes.
            names = [url.partition(f"@{files.commit}/")[2] for url in found[split]]
            paths = [files.path(one) for one in names]
            for path in paths:
                refuse_pointer(path, name)
            builder.config.data_files = {split: list(map(str, paths))}
            return list(builder.as_streaming_dataset(split))
    except SageHubError:
        raise
    except Exception as error:  # of whatever a script, a card or a file makes the library raise
        hubs = explain_any(error, f"dataset {files.name}")
        if hubs is not None and not isinstance(hubs, NotFoundError):  # that names no file
            raise hubs from None
        said = re.sub(r"\S*/snapshots/\w+/", "", first_line(error))  # of this machine
        raise ProxyError(f"{name} cannot be read: {said}") from None
