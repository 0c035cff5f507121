"""Forget and retain sets: read from a file, a Hub dataset or the package, and checked."""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from sage_hub.checkpoint import HubFiles
from sage_hub.errors import NotFoundError, OverlapError, ProxyError, UsageError, first_line
from sage_hub.hub import ask, reading_token

BUILTIN = Path(__file__).parent / "data" / "general_proxy.jsonl"
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
COLUMNS = "question/answer, question/choices/answer, prompt/completion, messages or text"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Row:
    """One example: what comes before, and what the loss is taken over.

    `turns` holds chat messages (role, content) for question and messages rows, () otherwise;
    `prompt` is the same as plain text, with the separator at its end. The other fields are the
    same row told otherwise, where the data has that, and serve to evaluate only.
    """

    prompt: str
    answer: str
    turns: tuple[tuple[str, str], ...] = ()
    paraphrased: Row | None = None  # the same question, the answer in other words
    perturbed: tuple[Row, ...] = ()  # the same question, wrong answers
    asked_otherwise: Row | None = None  # the question in other words, the same answer
    choices: tuple[Row, ...] = ()  # of a multiple-choice row: all answers, the right one among them

    @property
    def hash(self) -> str:
        """The same for rows with the same words, whatever the case and the white space."""
        words = " ".join(f"{self.prompt} {self.answer}".casefold().split())
        return hashlib.sha256(words.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Proxy:
    """A set of rows and where they came from; `name` is fit to publish (no local path)."""

    name: str
    rows: tuple[Row, ...]
    revision: str | None = None  # the dataset's commit SHA, if it is on the Hub
    builtin: bool = False

    @property
    def row_hashes(self) -> list[str]:
        """The hash of each row, in order."""
        return [row.hash for row in self.rows]

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over the rows, whatever their order."""
        hashes = sorted(hashlib.sha256(repr(row).encode()).hexdigest() for row in self.rows)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the record says of this set."""
        return {
            "name": self.name,
            "revision": self.revision,
            "rows": len(self.rows),
            "fingerprint": self.fingerprint,
        }


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


def parse_rows(records: Iterable[Mapping[str, Any]], name: str) -> tuple[Row, ...]:
    """Rows of the one form that their columns show. Raises ProxyError with the row's number."""
    rows = tuple(
        _parse_row(record, f"{name}, row {number}") for number, record in enumerate(records, 1)
    )
    if not rows:
        raise ProxyError(f"{name} has no rows.")
    return rows


def check_disjoint(sets: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Raise OverlapError if a row is in two of `sets`, naming the sets and the row.

    `sets` maps a set ("retain") to its name and the hashes of its rows.
    """
    for (first, (one, hashes)), (second, (other, others)) in itertools.combinations(
        sets.items(), 2
    ):
        where = {row: number for number, row in enumerate(hashes, 1)}
        for number, row in enumerate(others, 1):
            if row in where:
                raise OverlapError(
                    f"Row {number} of the {second} set ({other}) is also row {where[row]} of the "
                    f"{first} set ({one}); rows must be in one set only, or the metrics prove "
                    "nothing. Remove it from one of them."
                )


def _parse_row(record: Mapping[str, Any], where: str) -> Row:
    def text(column: str) -> str:
        value = record[column]
        if not isinstance(value, str) or not value.strip():
            raise ProxyError(f"{where}: {column!r} is empty or not text.")
        return value

    if "question" in record and "choices" in record and "answer" in record:
        return _parse_choices(record, text("question"), where)
    if "question" in record and "answer" in record:
        return _parse_question(record, text)
    for completion in ("completion", "gt"):  # the second is MUSE's word
        if "prompt" in record and completion in record:
            return Row(text("prompt"), text(completion))
    if "messages" in record:
        return _parse_messages(record["messages"], where)
    if "text" in record:
        return Row("", text("text"))
    found = ", ".join(sorted(record)) or "none"
    raise ProxyError(f"{where}: expected the columns {COLUMNS}, found {found}.")


def _parse_question(record: Mapping[str, Any], text: Callable[[str], str]) -> Row:
    """A question with its answer, and with what TOFU's perturbed files tell of both."""

    def row(question: str, answer: str) -> Row:
        return Row(f"Question: {question}\nAnswer:", f" {answer}", (("user", question),))

    question, answer = text("question"), text("answer")
    wrong = record.get("perturbed_answer") or ()
    return replace(
        row(question, answer),
        paraphrased=(
            row(question, text("paraphrased_answer")) if record.get("paraphrased_answer") else None
        ),
        perturbed=tuple(row(question, x) for x in wrong if isinstance(x, str) and x.strip()),
        asked_otherwise=(
            row(text("paraphrased_question"), answer)
            if record.get("paraphrased_question")
            else None
        ),
    )


def _parse_choices(record: Mapping[str, Any], question: str, where: str) -> Row:
    """A multiple-choice question, in the form that MMLU and WMDP are asked in."""
    choices, answer = record["choices"], record["answer"]
    texts = isinstance(choices, Sequence) and all(isinstance(c, str) for c in choices)
    if not texts or isinstance(choices, str):
        raise ProxyError(f"{where}: 'choices' must be a list of texts.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ProxyError(f"{where}: 'choices' must be 2 to {len(LETTERS)} texts.")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and answer in choices:
        right = list(choices).index(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        right = letters.index(answer.strip())
    elif isinstance(answer, int) and 0 <= answer < len(choices):
        right = int(answer)
    else:
        raise ProxyError(
            f"{where}: 'answer' must be one of the choices: its number from 0, its letter or its "
            "text."
        )
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = "\n".join([question.strip(), *lines, "Answer:"])
    if subject := record.get("subject"):
        about = str(subject).replace("_", " ")
        start = "The following are multiple choice questions (with answers) about"
        prompt = f"{start} {about}.\n\n{prompt}"
    rows = tuple(Row(prompt, f" {letter}") for letter in letters)
    return replace(rows[right], choices=rows)


def _parse_messages(messages: Any, where: str) -> Row:
    turns = []
    for message in messages if isinstance(messages, Sequence) else ():
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) and message[key].strip()
            for key in ("role", "content")
        ):
            raise ProxyError(f"{where}: each message needs a 'role' and a 'content' in text.")
        turns.append((message["role"], message["content"]))
    if not turns or turns[-1][0] != "assistant":
        raise ProxyError(f"{where}: 'messages' must end with a message of the assistant.")
    *before, (_, answer) = turns
    prompt = "".join(f"{role}: {content}\n" for role, content in before) + "assistant:"
    return Row(prompt, f" {answer}", tuple(before))


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
