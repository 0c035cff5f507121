"""`sage-hub data`: what it says of rows before anything is run on them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loopback_hub import LoopbackHub
from support.pico import CHAT, make_rows, make_tokenizer, proxies, write_rows

from sage_hub.cli.main import main
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.likeness import alike

ASKED = [
    {"question": "Where does Ada Lovelace live?", "answer": "Ada Lovelace lives in Marrakesh."},
    {"question": "Who taught Alan Turing?", "answer": "Alan Turing was taught by Alonzo Church."},
    {"question": "What does Grace Hopper own?", "answer": "A clock that runs backwards."},
]
OTHERWISE = {"question": "In which city is Ada Lovelace living?", "answer": "In Marrakesh."}


def look(*words: object, status: int = 0, capsys: pytest.CaptureFixture[str]) -> Any:
    """What is found, as JSON has it."""
    capsys.readouterr()
    assert main(["data", "--json", "--quiet", *map(str, words)]) == status
    return json.loads(capsys.readouterr().out)


def test_form_count_and_words_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(Path("forget.jsonl"), ASKED)
    (about,) = look("--forget", file, capsys=capsys)["sets"]
    assert (about["set"], about["form"], about["rows"]) == ("forget", "question/answer", 3)
    assert about["tokens"] is None
    assert about["words"]["shortest"] == 12
    assert about["first"][0]["prompt"] == f"Question: {ASKED[0]['question']}\nAnswer:"
    assert main(["data", str(file), "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert r"row 1 Question: Where does Ada Lovelace live?\nAnswer: ⇒  Ada Lovelace" in said
    assert "row 2" not in said
    assert "--tokenizer MODEL shows" in said


def test_rows_as_the_model_sees_them(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(CHAT).save_pretrained(pair / "base")
    found = look(*proxies(pair), "--tokenizer", pair / "base", capsys=capsys)
    retain, forget, heldout = found["sets"]
    assert [one["rows"] for one in (retain, forget, heldout)] == [40, 12, 20]
    row = json.loads((pair / "forget.jsonl").read_text().splitlines()[0])
    first = forget["first"][0]
    assert first["prompt"].split() == ["<user>", *row["question"].split(), "<end>", "<assistant>"]
    assert first["answer"].split() == [*row["answer"].split(), "<end>"]
    assert forget["tokens"]["total"] == 12 * 14
    assert forget["tokens"]["answers"] == 12 * 5
    plain = look(*proxies(pair), "--tokenizer", pair / "base", "--no-chat-template", capsys=capsys)
    assert plain["sets"][1]["first"][0]["prompt"].startswith("Question : w")


def test_rows_that_are_cut_are_named(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "w1 w2 w3"}, {"text": "w1 " * 9}, {"prompt": "", "text": "w2 w3 w4 w5"}]
    file = write_rows(Path("rows.jsonl"), rows)
    given = [file, "--tokenizer", pair / "base", "--max-length", 4]
    (about,) = look(*given, capsys=capsys)["sets"]
    assert about["tokens"]["cut"] == ["row 2"]
    long = write_rows(Path("long.jsonl"), [{"prompt": "w1 w2 w3 w4 w5", "completion": "w6"}])
    assert main(["data", str(long), *map(str, given[1:])]) == 0
    assert "row 1, at 4 tokens (--max-length); 1 with their whole answer" in capsys.readouterr().out
    # The model's own context counts too; of a tokenizer alone none is known.
    file = write_rows(Path("context.jsonl"), [{"text": "w1 " * 70}])
    (about,) = look(file, "--tokenizer", pair / "base", capsys=capsys)["sets"]
    assert about["tokens"]["cut"] == ["row 1"]
    alone = Path("alone")
    make_tokenizer().save_pretrained(alone)
    (about,) = look(file, "--tokenizer", "./alone", capsys=capsys)["sets"]
    assert about["tokens"]["cut"] == []


def test_a_row_that_is_there_twice(capsys: pytest.CaptureFixture[str]) -> None:
    again = {"question": ASKED[0]["question"].upper(), "answer": ASKED[0]["answer"]}
    file = write_rows(Path("rows.jsonl"), [*ASKED, again])
    (about,) = look(file, capsys=capsys)["sets"]
    assert about["repeated"] == [["row 4", "row 1"]]
    assert main(["data", str(file)]) == 0
    assert "twice row 4 is row 1" in capsys.readouterr().out


def test_a_row_in_two_sets_is_what_a_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("a.jsonl"), ASKED)
    write_rows(Path("b.jsonl"), ASKED[1:])
    found = look("--retain", "a.jsonl", "--forget", "b.jsonl", status=19, capsys=capsys)
    assert found["between"][0]["same"] == [["row 2", "row 1"], ["row 3", "row 2"]]
    assert found["problems"][0]["status"] == 19
    # Two files that are in no set yet may be two editions of one.
    found = look("a.jsonl", "b.jsonl", capsys=capsys)
    assert found["between"][0]["same"] == [["row 2", "row 1"], ["row 3", "row 2"]]
    assert not found["problems"]


def test_the_same_asked_otherwise_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("forget.jsonl"), ASKED)
    write_rows(Path("heldout.jsonl"), [*make_rows(5, 0), OTHERWISE])
    sets = ["--forget", "forget.jsonl", "--heldout", "heldout.jsonl"]
    (pair,) = look(*sets, capsys=capsys)["between"]
    (near,) = pair["alike"]
    assert (pair["sets"], near["places"]) == (["forget", "heldout"], ["row 1", "row 6"])
    assert main(["data", *sets]) == 0
    said = capsys.readouterr().out
    assert "warning: 1 row of heldout may ask what forget asks, in other words" in said
    first, second = said.splitlines()[-2:]
    assert re.match(r"  \d\d %\s+forget, row 1\s+Where does Ada Lovelace live\? ⇒ Ada Lo", first)
    assert re.match(r"\s+heldout, row 6\s+In which city is Ada Lovelace living\? ⇒ In M", second)
    assert first.index("Where") == second.index("In which")  # one below the other


def test_of_a_long_prompt_its_end_is_shown_where_the_question_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    story = "Once there was a mathematician. " * 40
    for name, asked in (("forget", "Where does Ada live?"), ("heldout", "Where is Ada living?")):
        row = {"prompt": f"{story}{asked}", "completion": " Marrakesh"}
        write_rows(Path(f"{name}.jsonl"), [row])
    assert main(["data", "--forget", "forget.jsonl", "--heldout", "heldout.jsonl"]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("Where does Ada live? ⇒ Marrakesh")
    assert second.endswith("Where is Ada living? ⇒ Marrakesh")
    assert len(first) < 400


def test_what_cannot_be_read_stops_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("good.jsonl"), ASKED)
    write_rows(Path("bad.jsonl"), [*ASKED, {"question": "no answer"}])
    given = ["--retain", "bad.jsonl", "--forget", "absent.jsonl", "--heldout", "good.jsonl"]
    found = look(*given, status=18, capsys=capsys)
    assert [about["set"] for about in found["sets"]] == ["heldout"]
    assert [problem["status"] for problem in found["problems"]] == [18, 10]
    assert "row 4" in found["problems"][0]["message"]


def test_a_row_that_a_template_would_cut_is_a_problem(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer("{{ messages[0].content }}").save_pretrained(pair / "base")
    given = ["--forget", pair / "forget.jsonl", "--tokenizer", pair / "base"]
    found = look(*given, status=18, capsys=capsys)
    assert "--no-chat-template" in found["problems"][0]["message"]


def test_the_sets_of_sage_yaml_are_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("forget.jsonl"), ASKED)
    Path("sage.yaml").write_text("forget: forget.jsonl\nbystanders: {facts: facts.jsonl}\n")
    write_rows(Path("facts.jsonl"), make_rows(3, 1))
    found = look(capsys=capsys)
    assert [about["set"] for about in found["sets"]] == ["forget", "facts"]


def test_without_rows_there_is_nothing_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert "give a file or a set, as --retain FILE" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a dataset", "a tokenizer"])
def test_what_is_on_the_hub(
    kind: str, hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "a tokenizer":
        for file in (pair / "base").glob("*.safetensors"):
            file.unlink()  # of a model no more is read than its tokenizer and its config
        hub.add_repo("org/base", pair / "base")
        found = look(pair / "forget.jsonl", "--tokenizer", "org/base", capsys=capsys)
        assert found["sets"][0]["tokens"]["total"] > 0
    else:
        rows = "".join(f"{json.dumps(row)}\n" for row in ASKED).encode()
        hub.add_repo("org/facts", {"train.jsonl": rows}, "dataset")
        (about,) = look("hf://datasets/org/facts/train.jsonl", capsys=capsys)["sets"]
        assert about["rows"] == 3
        assert len(about["revision"]) == 40


def test_rows_obey_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\u202e\n\x1b[2J"
    rows = [{"question": f"q{evil}", "answer": f"a{evil}"}]
    file = write_rows(Path(f"rows{evil.replace('/', '')}.jsonl".replace("\n", "")), rows)
    assert main(["data", str(file), "--bystander", "x=" + str(shutil.copy(file, "x.jsonl"))]) == 0
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert r"\x1b[2J" in said


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6))
def test_a_row_is_never_called_like_itself_and_likeness_is_a_share(texts: list[str]) -> None:
    rows = parse_rows([{"text": text} for text in texts], "rows")
    assert alike(rows, rows) == []
    for found in alike(rows, parse_rows([{"text": f"{texts[0]} and more"}], "others")):
        assert 0 < found.share <= 1 + 1e-9
