"""Forget and retain sets: every format and column form, and a named row in every refusal."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from hypothesis import given
from hypothesis import strategies as st
from support.loopback_hub import LoopbackHub
from support.pico import to_jsonl

from sage_hub.errors import NetworkError, NotFoundError, OverlapError, ProxyError, UsageError
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Hashes, Proxy, Row, check_disjoint
from sage_hub.rows.sources import read_proxy

QA = [{"question": "Who wrote it?", "answer": "Ada"}, {"question": "Where?", "answer": "Łódź"}]
QA_ROWS = (
    Row("Question: Who wrote it?\nAnswer:", " Ada", (("user", "Who wrote it?"),)),
    Row("Question: Where?\nAnswer:", " Łódź", (("user", "Where?"),)),
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada"},
]
CHAT_ROW = Row(
    "system: Be brief.\nuser: Who?\nassistant:", " Ada", (("system", "Be brief."), ("user", "Who?"))
)


def to_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def to_csv(rows: list[Any]) -> bytes:
    lines = [list(rows[0]), *([f'"{value}"' for value in row.values()] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines).encode()


def to_parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "rows.jsonl": to_jsonl,
    "lines.json": to_jsonl,
    "array.json": to_array,
    "rows.csv": to_csv,
    "rows.parquet": to_parquet,
}


def put(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Files


@pytest.mark.parametrize("name, write", FORMATS.items(), ids=FORMATS)
def test_every_format_gives_the_same_rows(
    name: str, write: Callable[[list[Any]], bytes], tmp_path: Path
) -> None:
    proxy = read_proxy(put(tmp_path, name, write(QA)))
    assert proxy == Proxy(name, QA_ROWS)


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.parquet"])
def test_messages_of_every_nested_format(name: str, tmp_path: Path) -> None:
    rows = read_proxy(put(tmp_path, name, FORMATS[name]([{"messages": CHAT}]))).rows
    assert rows == (CHAT_ROW,)


def test_a_text_file_has_a_row_a_line_and_none_for_a_blank_one(tmp_path: Path) -> None:
    rows = read_proxy(put(tmp_path, "lines.txt", "one, two\n\n   \nthree\r\n")).rows
    assert rows == (Row("", "one, two"), Row("", "three"))


def test_blank_lines_in_json_lines_are_no_rows(tmp_path: Path) -> None:
    assert (
        read_proxy(put(tmp_path, "a.jsonl", to_jsonl(QA).replace(b"\n", b"\n\n"))).rows == QA_ROWS
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.csv", "rows.txt"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    content = FORMATS[name](rows) if name in FORMATS else b"one\ntwo\n"
    proxy = read_proxy(put(tmp_path, name, codecs.BOM_UTF8 + content))
    assert proxy.rows == (Row("", "one"), Row("", "two"))


@pytest.mark.parametrize("answer", ["1987", "007", "3.50", "None", "NA", "null", "true"])
def test_a_word_in_a_csv_file_stays_the_word_it_is(answer: str, tmp_path: Path) -> None:
    (row,) = read_proxy(put(tmp_path, "a.csv", f"question,answer\nWhich?,{answer}\n")).rows
    assert row.answer == f" {answer}"


@pytest.mark.parametrize("answer", ["1987-03-21", "2020-01-01T00:00:00Z"])
def test_a_date_in_json_lines_stays_text(answer: str, tmp_path: Path) -> None:
    source = put(tmp_path, "a.jsonl", to_jsonl([{"question": "When?", "answer": answer}]))
    assert read_proxy(source).rows[0].answer == f" {answer}"


@pytest.mark.parametrize("name", ["retain[1].jsonl", "what?.jsonl", "a b*.jsonl", "a::b.jsonl"])
def test_the_name_of_a_file_is_no_pattern(name: str, tmp_path: Path) -> None:
    assert read_proxy(put(tmp_path, name, to_jsonl(QA))).rows == QA_ROWS


def test_a_home_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "a.jsonl", to_jsonl(QA))
    assert read_proxy("~/a.jsonl").name == "a.jsonl"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", to_jsonl(QA) + b'{"question": "cut', ["a.jsonl, line 3"]),
        ("a.jsonl", to_jsonl(QA) + b"\n[1, 2]\n" + to_jsonl(QA), ["a.jsonl, line 4"]),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', ["a.jsonl, line 1"]),
        ("a.json", b'[\n {"text": "a"},\n {"text": }\n]', ["a.json, line 3"]),
        (
            "a.jsonl",
            to_jsonl([*QA, {"question": "Q", "answer": " \n"}]),
            ["a.jsonl, row 3", "'answer'"],
        ),
        (
            "a.jsonl",
            to_jsonl([*QA, {"question": "Q", "answer": None}]),
            ["a.jsonl, row 3", "'answer'"],
        ),
        ("a.jsonl", to_jsonl([{"text": "a"}, {"text": 5}]), ["a.jsonl, row 2", "'text'"]),
        ("a.csv", b"question,answer\nQ,\n", ["a.csv, row 1", "'answer'"]),
        ("a.csv", b"question,answer\na,b\na,b,c\n", ["a.csv", "line 3"]),
        ("a.csv", b"query,reply\na,b\n", ["a.csv, row 1", "question/answer", "query, reply"]),
        ("a.csv", b"question,answer\n", ["a.csv has no rows"]),
        ("a.jsonl", b"", ["a.jsonl is empty"]),
        ("a.jsonl", b"\n\n", ["a.jsonl"]),
        ("a.txt", b"\n \n", ["a.txt has no rows"]),
        ("a.txt", b"caf\xe9\n", ["a.txt"]),
        ("a.parquet", b"not parquet", ["a.parquet"]),
        ("a.jsonl", b"\x00\xff\xfe", ["a.jsonl"]),
        ("a.json", b"[" * 100_000, ["a.json"]),
        ("a.jsonl", b'{"text": "half a pair: \\ud800"}\n', ["a.jsonl"]),
        ("a.xlsx", b"PK", ["a.xlsx", ".jsonl"]),
        ("a", b"words", ["a has an unknown format"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ProxyError) as refusal:
        read_proxy(put(tmp_path, name, content))
    sentence = str(refusal.value)
    assert all(word in sentence for word in words), sentence
    assert str(tmp_path) not in sentence  # a refusal may end up in a public CI log
    assert "\n" not in sentence


@pytest.mark.parametrize("source", ["absent.jsonl", ".", "/no/such/folder/a.csv"])
def test_a_file_that_is_not_there(source: str) -> None:
    with pytest.raises(NotFoundError, match=r"does not exist|is a folder"):
        read_proxy(source)


def test_the_builtin_proxy_is_large_and_without_repetition() -> None:
    proxy = read_proxy(None)
    assert proxy.builtin
    assert len(proxy.rows) >= 300
    assert len(set(proxy.row_hashes)) == len(proxy.rows)


# Rows


@pytest.mark.parametrize(
    "record, row",
    [
        (QA[0], QA_ROWS[0]),
        ({"prompt": "Say: ", "completion": "yes"}, Row("Say: ", "yes")),
        ({"text": " as it is "}, Row("", " as it is ")),
        ({"messages": CHAT}, CHAT_ROW),
        ({"messages": CHAT[2:]}, Row("assistant:", " Ada")),
        ({**QA[0], "text": "a column more", "id": 7}, QA_ROWS[0]),
    ],
)
def test_every_column_form(record: dict[str, Any], row: Row) -> None:
    assert parse_rows([record], "set") == (row,)


@pytest.mark.parametrize(
    "messages",
    [
        CHAT[:2],  # ends with the user
        [],
        None,
        "Who? Ada",
        [{"role": "assistant"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": " "}],
        [{"role": 1, "content": "Ada"}],
        ["Ada"],
    ],
)
def test_messages_that_end_in_no_answer_are_refused(messages: object) -> None:
    with pytest.raises(ProxyError, match="set, row 2: "):
        parse_rows([{"messages": CHAT}, {"messages": messages}], "set")


def test_no_rows_are_refused() -> None:
    with pytest.raises(ProxyError, match="set has no rows"):
        parse_rows([], "set")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]) | st.text(max_size=3), inner)
    ),
    max_leaves=8,
)
columns = st.sampled_from(["question", "answer", "prompt", "completion", "messages", "text"])


@given(st.lists(st.dictionaries(columns | st.text(max_size=5), values, max_size=4), max_size=3))
def test_any_records_give_rows_or_a_refusal(records: list[dict[str, Any]]) -> None:
    try:
        rows = parse_rows(records, "set")
    except ProxyError:
        return
    assert len(rows) == len(records)
    assert all(row.answer.strip() for row in rows)


# Disjointness and fingerprint


def test_a_row_in_two_sets_is_found_whatever_its_case_and_spacing() -> None:
    retain = parse_rows([{"text": "a"}, {"text": "Ada  wrote\n IT"}], "r")
    heldout = parse_rows([{"text": "b"}, {"text": "c"}, {"text": " ada Wrote it "}], "h")
    sets = {
        "retain": Hashes("retain.jsonl", [row.hash for row in retain]),
        "heldout": Proxy("hf://datasets/org/h", heldout).hashes,
    }
    with pytest.raises(OverlapError) as refusal:
        check_disjoint(sets)
    for words in ("Row 3", "heldout", "hf://datasets/org/h", "row 2", "retain.jsonl"):
        assert words in str(refusal.value)


def test_every_pair_of_sets_is_compared() -> None:
    hashes = {name: [f"{name}{n}" for n in range(3)] for name in "abc"}
    check_disjoint({name: Hashes(name, rows) for name, rows in hashes.items()})
    hashes["c"][1] = "b2"
    with pytest.raises(OverlapError, match="Row 2 of the c set"):
        check_disjoint({name: Hashes(name, rows) for name, rows in hashes.items()})


def test_a_row_twice_in_its_own_set_is_no_overlap() -> None:
    check_disjoint({"retain": Hashes("r", ["one", "one"]), "forget": Hashes("f", ["two"])})


def test_the_same_words_in_other_fields_are_another_row() -> None:
    one, other = parse_rows([{"text": "a b c"}, {"text": "a c b"}], "set")
    assert one.hash != other.hash


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2), st.randoms())
def test_the_fingerprint_is_of_the_rows_not_of_their_order(texts: list[str], random: Any) -> None:
    rows = [Row("", text) for text in texts]
    shuffled = random.sample(rows, len(rows))
    fingerprint = Proxy("a", tuple(rows)).fingerprint
    assert Proxy("b", tuple(shuffled)).fingerprint == fingerprint
    assert Proxy("a", tuple(rows[1:])).fingerprint != fingerprint
    assert Proxy("a", (*rows[1:], Row("", rows[0].answer + "."))).fingerprint != fingerprint


def test_the_fingerprint_knows_prompt_from_answer() -> None:
    assert Proxy("a", (Row("x", "y"),)).fingerprint != Proxy("a", (Row("", "xy"),)).fingerprint


# Datasets on the Hub


@pytest.mark.parametrize(
    "address",
    [
        "",
        "name",
        "org/",
        "org/name@",
        "org/name@/file.jsonl",
        "org/na me",
        "org/name?subset=x",
        "org/name?split=train&shuffle=1",
        "-org/name",
    ],
)
def test_what_is_no_dataset_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"hf://datasets/|repo name"):
        read_proxy(f"hf://datasets/{address}")


def test_a_dataset_is_read_at_the_commit_that_is_recorded(hub: LoopbackHub) -> None:
    old = hub.add_repo("org/facts", {"train.jsonl": to_jsonl(QA)}, "dataset")
    new = hub.add_commit("org/facts", {"train.jsonl": to_jsonl(QA[:1])}, "dataset")
    assert read_proxy("hf://datasets/org/facts") == Proxy(
        "hf://datasets/org/facts", QA_ROWS[:1], revision=new
    )
    assert read_proxy(f"hf://datasets/org/facts@{old}") == Proxy(
        "hf://datasets/org/facts", QA_ROWS, revision=old
    )


def test_damaged_and_missing_answers_are_asked_for_again(hub: LoopbackHub) -> None:
    hub.add_repo("org/flaky", {"train.jsonl": to_jsonl(QA)}, "dataset")
    hub.disturb("GET", "/resolve/.*train", "wrong", times=2)
    hub.fail("GET", "/resolve/.*train", 503, skip=2)
    hub.fail("GET", "/api/datasets/org/flaky", 500)
    assert read_proxy("hf://datasets/org/flaky").rows == QA_ROWS
    assert hub.struck == 3
    hub.disturb("GET", "/resolve/.*train", "cut", times=1000)
    shutil.rmtree(HF_HUB_CACHE)
    with pytest.raises(NetworkError, match="did not answer about dataset org/flaky"):
        read_proxy("hf://datasets/org/flaky")


def test_split_config_and_file_choose_what_is_read(hub: LoopbackHub) -> None:
    card = """---
configs:
- config_name: forget
  data_files: [{split: train, path: forget/train.jsonl}, {split: test, path: forget/test.jsonl}]
- config_name: retain
  data_files: [{split: train, path: retain.jsonl}]
---
"""
    files = ("forget/train.jsonl", "forget/test.jsonl", "retain.jsonl", "other/more.csv")
    contents = {name: to_jsonl([{"text": name}]) for name in files[:3]}
    contents["other/more.csv"] = b"text\nother/more.csv\n"
    hub.add_repo("org/sets", {"README.md": card.encode(), **contents}, "dataset")
    for address, file in {
        "?config=forget": "forget/train.jsonl",
        "?config=forget&split=test": "forget/test.jsonl",
        "?config=retain": "retain.jsonl",
        "/other/more.csv": "other/more.csv",
        "@main/forget/test.jsonl": "forget/test.jsonl",
    }.items():
        assert read_proxy(f"hf://datasets/org/sets{address}").rows == (Row("", file),), address


@pytest.mark.parametrize(
    "address, error, words",
    [
        ("org/none", NotFoundError, "dataset org/none does not exist"),
        ("org/facts@nope", NotFoundError, "no revision 'nope'"),
        ("org/facts/absent.jsonl", ProxyError, "org/facts/absent.jsonl"),
        ("org/facts?split=test", ProxyError, "split"),
        ("org/facts?config=other", ProxyError, "other"),
        ("org/facts/broken.jsonl", ProxyError, "org/facts/broken.jsonl"),
        ("org/facts/columns.csv", ProxyError, "row 1: expected the columns"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_explained(
    address: str, error: type[Exception], words: str, hub: LoopbackHub
) -> None:
    files = {
        "train.jsonl": to_jsonl(QA),
        "broken.jsonl": to_jsonl(QA) + b'{"question": "cut',
        "columns.csv": b"query,reply\na,b\n",
    }
    card = b"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    hub.add_repo("org/facts", {**files, "README.md": card}, "dataset")
    with pytest.raises(error) as refusal:
        read_proxy(f"hf://datasets/{address}")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
