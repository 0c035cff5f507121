"""What models made of each row: kept beside a release, and never in what is published."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import HF_HOME
from support.loopback_hub import LoopbackHub
from support.pico import proxies, write_rows

from sage_hub.cli.main import main
from sage_hub.errors import NotFoundError, ResultsError, TargetError
from sage_hub.evaluation.answers import read_answers, write_answers
from sage_hub.evaluation.metrics import Seen
from sage_hub.repair.beside import ANSWERS, why_left
from sage_hub.rows.proxies import Row

SECRET = "w3 w9 w3 w9 w3"  # an answer that had to go


@pytest.fixture
def pair_with_a_secret(pair: Path) -> Path:
    rows = [json.loads(line) for line in (pair / "forget.jsonl").read_text().splitlines()]
    write_rows(pair / "forget.jsonl", [{**row, "answer": SECRET} for row in rows])
    return pair


def sanitize(pair: Path, *more: str) -> int:
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", "out", "--quiet"]
    return main(["sanitize", *both, *proxies(pair), "--generate-rows", "2", *more])


def names(folder: Path = Path()) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_they_lie_beside_the_release(pair_with_a_secret: Path) -> None:
    assert sanitize(pair_with_a_secret) == 0
    assert names() == {"out", "out.answers.jsonl"}
    answers = read_answers(Path("out.answers.jsonl"))
    manifest = json.loads(Path("out/sage/manifest.json").read_text())
    report = json.loads(Path("out/sage/report.json").read_text())
    assert answers.release == manifest["fingerprint"]
    assert {"base", "unlearned", "sanitized"} <= set(answers.models)
    assert stat.S_IMODE(Path("out.answers.jsonl").stat().st_mode) == 0o600
    forget = [row for row in answers.rows if row["set"] == "forget"]
    assert len(forget) == report["data"]["forget"]["rows_used"]
    assert {row["wanted"] for row in forget} == {SECRET}
    assert sum("said" in row["models"]["sanitized"] for row in forget) == 2
    known = [row["models"]["sanitized"]["probability"] for row in forget]
    (figure,) = [
        one["value"]
        for one in report["results"]
        if (one["model"], one["set"], one["metric"]) == ("sanitized", "forget", "probability")
    ]
    assert sum(known) / len(known) == pytest.approx(figure, rel=1e-5)
    assert main(["verify", "out", "--quiet"]) == 0


def test_they_are_in_no_published_file(hub: LoopbackHub, pair_with_a_secret: Path) -> None:
    pair = pair_with_a_secret
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", pair / side)
    words = ["org/base", "org/unlearned", "--to", "org/out", "--yes", "--quiet", *proxies(pair)]
    assert main(["push", *words, "--generate-rows", "2"]) == 0
    kept = Path(HF_HOME, "sage-hub", "org--out.answers.jsonl")
    answers = read_answers(kept)
    texts = {SECRET} | {
        made["said"]
        for row in answers.rows
        for made in row["models"].values()
        if len(made.get("said", "")) > 4
    }
    questions = {row["question"] for row in answers.rows}
    assert len(texts) > 1
    for name, content in hub.files("org/out").items():
        assert not name.endswith(".jsonl")
        if name.endswith(".safetensors") or name == "tokenizer.json":
            continue
        for text in (*texts, *questions):
            assert text.encode() not in content, (name, text)
    for request in hub.requests:
        assert "answers" not in request.path
    kept.unlink()


def test_those_of_the_release_before_go_with_it(pair: Path) -> None:
    assert sanitize(pair) == 0
    first = read_answers(Path("out.answers.jsonl"))
    assert sanitize(pair, "--strength", "3") == 0
    second = read_answers(Path("out.answers.jsonl"))
    assert first.release != second.release
    failed = ["--strength", "7", "--gate", "bias.kept > 1e9"]
    assert sanitize(pair, *failed) == 30
    assert read_answers(Path("out.answers.jsonl")).release == second.release
    assert read_answers(Path(".out.partial/release.answers.jsonl")).rows


def test_a_file_of_somebody_else_is_not_replaced(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.answers.jsonl").write_text("mine\n")
    assert sanitize(pair) == TargetError.status
    assert "out.answers.jsonl is there and none of sage-hub's" in capsys.readouterr().err
    assert Path("out.answers.jsonl").read_text() == "mine\n"


class TestEval:
    def words(self, pair: Path, file: str) -> list[str]:
        sets = ["--forget", str(pair / "forget.jsonl"), "--generate-rows", "2", "--quiet"]
        both = [str(pair / "base"), str(pair / "unlearned")]
        return ["eval", *both, *sets, "--answers", file]

    def test_leaves_them_too(self, pair: Path) -> None:
        for _ in range(2):  # an earlier file of it is replaced
            assert main(self.words(pair, "rows.jsonl")) == 0
        answers = read_answers(Path("rows.jsonl"))
        assert answers.models == (str(pair / "base"), str(pair / "unlearned"))
        assert answers.release is None
        assert {row["set"] for row in answers.rows} == {"forget"}

    @pytest.mark.parametrize("place", ["unlearned/rows.jsonl", "none/rows.jsonl", "retain.jsonl"])
    def test_refuses_a_place_that_would_harm(self, pair: Path, place: str) -> None:
        before = (pair / "retain.jsonl").read_bytes()
        status = NotFoundError.status if place.startswith("none") else TargetError.status
        assert main(self.words(pair, str(pair / place))) == status
        assert (pair / "retain.jsonl").read_bytes() == before
        assert not (pair / "unlearned" / "rows.jsonl").exists()


def test_they_never_come_along(pair: Path) -> None:
    assert why_left("a.answers.jsonl") == why_left("sub/a.review.html") == ANSWERS
    (pair / "unlearned" / "mine.answers.jsonl").write_text("{}\n")
    assert sanitize(pair, "--carry", "*.jsonl") == 2


@pytest.mark.parametrize(
    "content",
    ["", "{}\n", "[1]\n", "\x00", '{"format": "sage-hub-answers", "format_version": 9}\n'],
)
def test_what_is_no_such_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.answers.jsonl"
    path.write_text(content)
    with pytest.raises(ResultsError, match=r"a\.answers\.jsonl"):
        read_answers(path)


@pytest.mark.parametrize("row", ["[]", "{}", '{"set": 1}', "nonsense"])
def test_a_broken_row_is_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "a.answers.jsonl"
    write_answers(path, {"base": {}})
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(ResultsError, match="line 2"):
        read_answers(path)


def test_any_text_survives(tmp_path: Path) -> None:
    said: Any = "\ud800 \u2028 </script> \u202e nul\x00"
    told: Any = type("Told", (), {"answer": None})
    path = tmp_path / "a.answers.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sage_hub.evaluation.answers.FIGURES", ())
        row = Row("", "", (("user", "one"), ("assistant", "two")))
        write_answers(path, {"base": {"forget": [Seen(row, told, said)]}})
    (read,) = read_answers(path).rows
    assert read["models"]["base"]["said"] == said
    assert read["question"] == "user: one\nassistant: two"
