"""Rows as people have them: encodings, gzip, other column names, lists in cells, one form a set."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loopback_hub import LoopbackHub

from sage_hub.errors import NotFoundError, OverlapError, ProxyError
from sage_hub.rows.cells import texts_of
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Row, check_disjoint
from sage_hub.rows.sources import read_proxy

QA = [{"question": "Who wrote it?", "answer": "Ada"}, {"question": "Where?", "answer": "Łódź"}]
ROWS = parse_rows(QA, "set")
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in QA)
CSV = "question,answer\nWho wrote it?,Ada\nWhere?,Łódź\n"
ARRAY = json.dumps(QA, ensure_ascii=False, indent=2)
PRETTY = "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in QA)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


def put(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def to_csv(rows: list[dict[str, str]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


# Files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("a.json", ARRAY),
        ("pretty.json", PRETTY),
        ("pretty.jsonl", PRETTY),
        ("windows.jsonl", LINES.replace("\n", "\r\n")),
        ("a.csv", CSV),
        ("A.CSV", CSV),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_any_encoding_of_any_file_gives_the_same_rows(
    name: str, text: str, encoding: str, packed: bool, tmp_path: Path
) -> None:
    raw = text.encode(encoding)
    source = put(tmp_path, f"{name}.gz" if packed else name, gzip.compress(raw) if packed else raw)
    assert read_proxy(source).rows == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lines_of_text_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    raw = "Ada\r\n\r\nŁódź\n".encode(encoding)
    rows = read_proxy(put(tmp_path, "a.txt", raw)).rows
    assert [(row.answer, row.place) for row in rows] == [
        ("Ada", "row 1"),
        ("Łódź", "row 2 (line 3)"),
    ]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.CSV"]
)
def test_a_pointer_of_git_lfs_is_no_set(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProxyError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        read_proxy(put(tmp_path, name, POINTER))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be unpacked"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES.encode(), mtime=0)[:-9],
            "a.jsonl.gz cannot be unpacked",
        ),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "a.parquet.gz has an unknown format"),
        ("a.gz", gzip.compress(LINES.encode(), mtime=0), "a.gz has an unknown format"),
        ("a.json", PRETTY.encode() + b"\n{\n 3}", "a.json, line 9: not a JSON object"),
        ("a.jsonl", codecs.BOM_UTF16_LE + b"\x00\xd8x\x00", "a.jsonl, line 1: not text"),
        ("a.csv", b"question,answer\nQ,caf\xe9\n", "a.csv, line 2: not text"),
        ("a.jsonl", b"\n\n" + LINES.encode() + b'{"question": 1}', "a.jsonl, row 3 (line 5): "),
    ],
)
def test_what_cannot_be_read_says_where(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ProxyError) as refusal:
        read_proxy(put(tmp_path, name, content))
    assert words in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_an_overlap_names_the_line_where_it_is_not_the_number_of_the_row(tmp_path: Path) -> None:
    retain = read_proxy(put(tmp_path, "retain.jsonl", b"\n\n" + LINES.encode()))
    forget = read_proxy(put(tmp_path, "forget.csv", to_csv(QA[1:])))
    with pytest.raises(
        OverlapError, match=r"Row 1 of the f.*\(forget\.csv\).* row 2 \(line 4\) of the r"
    ):
        check_disjoint({"retain": retain.hashes, "forget": forget.hashes})


# Forms


def asked(question: str, answer: str, system: str = "") -> Row:
    turns = (("user", question),)
    if not system:
        return Row(f"Question: {question}\nAnswer:", f" {answer}", turns)
    prompt = f"{system}\n\nQuestion: {question}\nAnswer:"
    return Row(prompt, f" {answer}", (("system", system), *turns))


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada"},
]
CHAT_ROW = parse_rows([{"messages": CHAT}], "set")[0]
SHARE = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada"}]


@pytest.mark.parametrize(
    "record, row",
    [
        ({"instruction": "Say it.", "output": "Ada"}, asked("Say it.", "Ada")),
        ({"instruction": "Say it.", "input": "", "output": "Ada"}, asked("Say it.", "Ada")),
        ({"instruction": "Say", "input": "A", "output": "Ada"}, asked("Say\n\nA", "Ada")),
        ({"prompt": "Who?", "response": "Ada"}, asked("Who?", "Ada")),
        ({"prompt": "Who?", "response": "Ada", "system": "Hm."}, asked("Who?", "Ada", "Hm.")),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SHARE]}, CHAT_ROW),
        ({"conversations": SHARE, "system": "Be brief."}, CHAT_ROW),
        ({"conversations": CHAT}, CHAT_ROW),
        ({"prompt": CHAT[:2], "completion": CHAT[2:]}, CHAT_ROW),
        (
            {
                "messages": [
                    {**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT
                ]
            },
            CHAT_ROW,
        ),
        ({"messages": [{**m, "tool_calls": None, "name": None} for m in CHAT]}, CHAT_ROW),
        ({**QA[0], "choices": None, "perturbed_answer": [], "text": ""}, ROWS[0]),
        ({"text": "a b", "question": None, "answer": None, "messages": None}, Row("", "a b")),
        # What was read before is read as before.
        ({"instruction": "x", "output": "y", "text": "a b"}, Row("", "a b")),
        ({"prompt": "Say: ", "completion": "yes", "response": "no"}, Row("Say: ", "yes")),
    ],
)
def test_every_form_that_people_have(record: dict[str, Any], row: Row) -> None:
    assert parse_rows([record], "set") == (row,)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"conversations": [{"from": "narrator", "value": "x"}, *SHARE]}, "'narrator'"),
        ({"conversations": SHARE[:1]}, "must end with a message of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[2]]}, "image"),
        ({"messages": CHAT, "tools": "{not json"}, "'tools' must be"),
        ({"messages": CHAT, "tools": [3]}, "'tools' must be"),
        ({"instruction": "x", "output": None}, "'output' is empty"),
        ({"prompt": "x", "response": 4}, "'response' is empty or not text"),
    ],
)
def test_what_no_form_can_hold_is_refused_by_row(record: dict[str, Any], words: str) -> None:
    good = {"conversations": SHARE} if "conversations" in record else {"messages": CHAT}
    with pytest.raises(ProxyError, match="set, row 2: ") as refusal:
        parse_rows([good, record], "set")
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "first, other",
    [
        (QA[0], {"question": "2+2?", "choices": ["3", "4"], "answer": 1}),
        (QA[0], {"text": "a"}),
        ({"text": "a"}, {"messages": CHAT}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}),
        # The probability of the second is relative to its wrong answers.
        (QA[0], {**QA[1], "perturbed_answer": ["Oslo"]}),
    ],
)
def test_a_set_has_rows_of_one_form(first: dict[str, Any], other: dict[str, Any]) -> None:
    for one, two in ((first, other), (other, first)):
        with pytest.raises(ProxyError, match=r"set, row 7: a row with .* row 1 is one with "):
            parse_rows([*[one] * 6, *[two] * 6], "set")


# Cells


@pytest.mark.parametrize(
    "cell, texts",
    [
        ("w3 w4", ("w3 w4",)),
        (1912, ("1912",)),
        ([1912, 1913.5], ("1912", "1913.5")),
        (["w3", 3], ("w3", "3")),
        ("['w3 w4', 'w5']", ("w3 w4", "w5")),
        ('["w3 w4", "w5"]', ("w3 w4", "w5")),
        ("['w3 w4' 'w5'\n 'w6']", ("w3 w4", "w5", "w6")),  # as NumPy prints it
        ("""["it's", 'a, b']""", ("it's", "a, b")),
        ("[1912, 1913]", ("1912", "1913")),
        ("['one',]", ("one",)),
    ],
)
def test_a_cell_of_texts(cell: object, texts: tuple[str, ...], tmp_path: Path) -> None:
    assert texts_of(cell, "it") == texts
    (row,) = parse_rows([{**QA[0], "perturbed_answer": cell}], "set")
    assert [one.answer for one in row.perturbed] == [f" {text}" for text in texts]
    if isinstance(cell, str):
        source = put(tmp_path, "a.csv", to_csv([{**QA[0], "perturbed_answer": cell}]))
        assert read_proxy(source).rows == (row,)


@pytest.mark.parametrize(
    "cell",
    [["w3", None], ["w3", " "], [["w3"]], True, {"a": 1}, "[w3, w4]", "['w3'", "[", "[null]", b"w"],
)
def test_no_item_of_a_cell_is_dropped(cell: object) -> None:
    for column in ("perturbed_answer", "choices"):
        with pytest.raises(ProxyError, match=rf"set, row 1: '{column}'"):
            parse_rows([{**QA[0], column: cell}], "set")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1))
def test_a_printed_list_is_read_as_the_list(texts: list[str]) -> None:
    assert texts_of(repr(texts), "it") == texts_of(json.dumps(texts), "it") == tuple(texts)


@pytest.mark.parametrize("answer", ["1", "B", "Rome"])
def test_choices_in_a_cell(answer: str, tmp_path: Path) -> None:
    row = {"question": "Capital?", "choices": "['Paris', 'Rome']", "answer": answer}
    (read,) = read_proxy(put(tmp_path, "a.csv", to_csv([row]))).rows
    assert (read.prompt, read.answer) == ("Capital?\nA. Paris\nB. Rome\nAnswer:", " B")


# Datasets on the Hub


@pytest.mark.parametrize(
    "revision, address",
    [
        ("refs/pr/1", "@refs/pr/1/train.jsonl"),
        ("refs/pr/1", "@refs%2Fpr%2F1/train.jsonl"),
        ("refs/pr/1", "@refs/pr/1"),
        ("refs/convert/parquet", "@refs/convert/parquet/train.jsonl"),
        ("refs/convert/parquet", "@refs/convert/parquet"),
        ("refs/convert/parquet", "@~parquet"),
        ("refs/convert/parquet", "@~parquet/train.jsonl"),
        ("refs/heads/a/b", "@a%2Fb/train.jsonl"),
    ],
)
def test_a_revision_with_slashes(revision: str, address: str, hub: LoopbackHub) -> None:
    hub.add_repo("org/facts", {"train.jsonl": b'{"text": "main"}\n'}, "dataset")
    repo = hub.repos["dataset", "org/facts"]
    parent = repo.at("main")
    blob = hub._blob(repo, "train.jsonl", LINES.encode())
    there = repo.commit(revision, {**parent.files, "train.jsonl": blob}, parent, "there")
    proxy = read_proxy(f"hf://datasets/org/facts{address}")
    assert (proxy.rows, proxy.revision) == (ROWS, there.sha)
    file = "/train.jsonl" if address.endswith("/train.jsonl") else ""
    assert proxy.name == f"hf://datasets/org/facts{file}"


def test_of_a_dataset_with_a_script_a_file_is_read(hub: LoopbackHub) -> None:
    files = {"facts.py": b"import datasets\n", "data/forget.jsonl": LINES.encode()}
    hub.add_repo("org/facts", files, "dataset")
    assert read_proxy("hf://datasets/org/facts/data/forget.jsonl").rows == ROWS
    with pytest.raises(ProxyError, match=r"org/facts cannot be read: .*script"):
        read_proxy("hf://datasets/org/facts")


@pytest.mark.parametrize("split", ["", "?split=train[:3]", "?split=validation", "?split=test[1]"])
def test_a_split_that_is_not_there_names_those_that_are(split: str, hub: LoopbackHub) -> None:
    hub.add_repo("org/facts", {"test.jsonl": LINES.encode()}, "dataset")
    with pytest.raises(ProxyError, match=r"org/facts.* has no split .*\(test\)"):
        read_proxy(f"hf://datasets/org/facts{split}")
    assert read_proxy("hf://datasets/org/facts?split=test").rows == ROWS


def test_files_of_a_dataset_are_read_as_local_ones_are(hub: LoopbackHub) -> None:
    files = {"a.jsonl.gz": gzip.compress(LINES.encode()), "b.csv": CSV.encode(), "c.txt": POINTER}
    hub.add_repo("org/facts", files, "dataset")
    for name in ("a.jsonl.gz", "b.csv"):
        assert read_proxy(f"hf://datasets/org/facts/{name}").rows == ROWS
    with pytest.raises(ProxyError, match=r"c\.txt is a Git LFS pointer"):
        read_proxy("hf://datasets/org/facts/c.txt")
    with pytest.raises((ProxyError, NotFoundError), match="nothing"):
        read_proxy("hf://datasets/org/facts/nothing.jsonl")
