"""`sage-hub review`: a page about a release, with or without the answers beside it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import HF_HOME
from support.loopback_hub import LoopbackHub
from support.pico import proxies

import sage_hub
from sage_hub.cli.main import main
from sage_hub.errors import (
    CorruptCheckpointError,
    NotFoundError,
    ResultsError,
    TargetError,
)


def content(page: Path) -> Any:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(
        r'<script type="application/json" id="content">(.*?)</script>', text, re.S
    )
    return json.loads(found)


@pytest.fixture(scope="module")
def _made(_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    both = [str(_pair / "base"), str(_pair / "unlearned"), "--output", str(folder / "out")]
    more = ["--generate-rows", "3", "--gate", "bias.kept <= 1", "--quiet"]
    assert main(["sanitize", *both, *proxies(_pair), *more]) == 0
    return folder


@pytest.fixture
def release(_made: Path, tmp_path: Path) -> Path:
    """A finished release with its answers beside it."""
    shutil.copytree(_made, tmp_path / "made")
    return tmp_path / "made" / "out"


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not addresses.append(address))
    return addresses


def test_it_shows_what_the_record_and_the_answers_hold(
    release: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["review", str(release)]) == 0
    page = release.with_name("out.review.html")
    assert capsys.readouterr().out.strip() == str(page)
    assert opened == [page.as_uri()]
    shown = content(page)
    report = json.loads((release / "sage" / "report.json").read_text())
    manifest = json.loads((release / "sage" / "manifest.json").read_text())
    assert shown["lacks"] == []
    assert shown["answers"]["counts"] == {
        which: about["rows_used"] for which, about in report["data"].items()
    }
    assert next(row["set"] for row in shown["answers"]["rows"]) == "forget"
    assert sum(row["said"] is not None for row in shown["answers"]["rows"]) == 6
    assert shown["pictures"]["search"]["gain"] == manifest["gain"]
    tried = manifest["gain_search"]["tried"]
    assert len(shown["pictures"]["search"]["tried"]) == len(tried)
    assert {one["model"] for one in shown["pictures"]["tradeoff"]["models"]} >= {
        "base",
        "sanitized",
    }
    assert shown["gates"][0]["passed"]
    assert dict(shown["record"]["files"]) == manifest["files"]
    assert shown["command"].startswith("sage-hub push")
    assert len(shown["verdict"]) >= 3
    assert main(["verify", str(release), "--quiet"]) == 0  # nothing came into it


def test_from_python_nothing_is_opened(release: Path, opened: list[str]) -> None:
    made = sage_hub.review(str(release))
    assert made == sage_hub.Review(
        release.with_name("out.review.html"), release.with_name("out.answers.jsonl"), ()
    )
    assert content(made.page)["answers"]["rows"]
    other = sage_hub.review(str(release), answers=str(made.answers), output="page.html")
    assert other.page.read_bytes() == made.page.read_bytes()
    assert opened == []


def test_what_speaks_against_a_release_is_read_first(release: Path) -> None:
    path = release / "sage" / "report.json"
    report = json.loads(path.read_text())
    report["gates"][0]["passed"] = False
    path.write_text(json.dumps(report))
    assert main(["review", str(release), "--no-open"]) == 0
    first, *others = content(release.with_name("out.review.html"))["verdict"]
    assert first["text"].startswith("1 of 1 gates is not met")
    assert first["tone"] == "bad"
    assert "bad" not in {remark["tone"] for remark in others}


def test_without_answers_it_says_how_to_make_them(
    release: Path, pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release.with_name("out.answers.jsonl").unlink()
    assert main(["review", str(release), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["answers"] is None
    assert content(Path(said["page"]))["answers"] is None
    assert "is not there" in said["lacks"][0]
    command = said["lacks"][-1]
    assert command.startswith("sage-hub eval ./base ./unlearned")
    monkeypatch.chdir(pair)
    assert main([*shlex.split(command)[1:], "--quiet"]) == 0  # it is the command that it says
    assert main(["review", str(release), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{", ""]))
    assert said["answers"] == str(release.with_name("out.answers.jsonl"))
    assert "as `sage-hub eval` asked them" in said["lacks"][0]
    shown = content(Path(said["page"]))["answers"]
    assert shown["own"][:2] == ["./base", "./unlearned"]
    assert shown["counts"].keys() == {"forget", "heldout", "retain"}


def test_answers_of_another_release(release: Path, tmp_path: Path) -> None:
    kept = release.with_name("out.answers.jsonl")
    manifest = json.loads((release / "sage" / "manifest.json").read_text())
    kept.write_text(kept.read_text().replace(manifest["fingerprint"], "0" * 64))
    assert main(["review", str(release), "--no-open"]) == 0
    shown = content(release.with_name("out.review.html"))
    assert shown["answers"] is None
    assert "of another release" in shown["lacks"][0]
    assert main(["review", str(release), "--answers", str(kept)]) == ResultsError.status


def test_of_a_release_on_the_hub(hub: LoopbackHub, pair: Path, opened: list[str]) -> None:
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", pair / side)
    words = ["org/base", "org/unlearned", "--yes", "--quiet", *proxies(pair), "--gain", "1"]
    assert main(["push", *words, "--generate-rows", "1"]) == 0
    before = hub.files("org/unlearned-sage")
    assert main(["review", "org/unlearned-sage", "--no-open"]) == 0
    shown = content(Path("org--unlearned-sage.review.html"))
    assert shown["answers"]["rows"]
    assert shown["title"] == "org/unlearned-sage"
    assert hub.files("org/unlearned-sage") == before
    assert opened == []
    Path(HF_HOME, "sage-hub", "org--unlearned-sage.answers.jsonl").unlink()
    assert main(["review", "org/unlearned-sage", "--no-open"]) == 0
    assert content(Path("org--unlearned-sage.review.html"))["answers"] is None


def test_what_would_harm_is_refused(release: Path, pair: Path) -> None:
    inside = ["review", str(release), "--output", str(release / "review.html")]
    assert main(inside) == TargetError.status
    assert not (release / "review.html").exists()
    mine = release.with_name("mine.html")
    mine.write_text("mine")
    assert main(["review", str(release), "--output", str(mine)]) == TargetError.status
    assert mine.read_text() == "mine"
    nowhere = str(release.parent / "none" / "page.html")
    assert main(["review", str(release), "--output", nowhere]) == NotFoundError.status
    assert main(["review", str(pair / "base")]) == NotFoundError.status
    assert main(["review", str(release), "--answers", nowhere]) == NotFoundError.status


@pytest.mark.parametrize("break_it", ["results", "control_by", "gates", "data"])
def test_a_record_that_was_changed_is_no_internal_error(
    break_it: str, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = release / "sage" / "report.json"
    for broken in (None, 7, [3]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {break_it: broken}))
        status = main(["review", str(release), "--no-open"])
        assert status in (0, CorruptCheckpointError.status), capsys.readouterr().err


def test_the_audit_as_a_page(pair: Path, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    both = [str(pair / "base"), str(pair / "unlearned"), "--quiet"]
    sets = ["--retain", str(pair / "retain.jsonl"), "--forget", str(pair / "forget.jsonl")]
    for _ in range(2):
        assert main(["audit", *both, *sets, "--html", str(page)]) == 0
    shown = content(page)
    assert "of the base's outputs" in shown["verdict"][0]["text"]
    assert shown["pictures"]["bias"]
    assert shown["pictures"]["profile"]["curve"]
    assert shown["modules"]["rows"][0][0][0].startswith("model.layers.")
    page.write_text("mine")
    assert main(["audit", *both, *sets, "--html", str(page)]) == TargetError.status
    assert page.read_text() == "mine"
