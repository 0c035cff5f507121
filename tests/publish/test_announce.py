"""A release announced on its source: asked for, refused in the plan, and never at its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from support.loopback_hub import LoopbackHub

from sage_hub.cli.main import main
from sage_hub.publish.announce import with_field

CARD = "---\nlicense: mit  # as ever\nlanguage:\n- no\n---\n\n# A model\n"


def push(pair: Path) -> list[str]:
    """A push that announces."""
    sets = ["--retain", str(pair / "retain.jsonl"), "--generate-rows", "0", "--quiet", "--yes"]
    return ["push", "org/base", "org/unlearned", *sets, "--announce"]


@pytest.fixture
def words(on_hub: LoopbackHub, pair: Path) -> list[str]:
    """The same, of a model with a card."""
    on_hub.add_commit("org/unlearned", {"README.md": CARD.encode()})
    return push(pair)


def proposals(hub: LoopbackHub) -> list[tuple[str, str]]:
    repo = hub.repos["model", "org/unlearned"]
    return [(pr.title, pr.author) for pr in repo.pull_requests]


def test_the_card_of_the_source_gets_one_line_more(
    on_hub: LoopbackHub, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json"]) == 0
    assert proposals(on_hub) == [("New version: org/unlearned-sage", "alice")]
    done = json.loads(capsys.readouterr().out)
    assert done["announced"] == f"{on_hub.url}/org/unlearned/discussions/1"
    proposed = on_hub.files("org/unlearned", "refs/pr/1")
    expected = CARD.replace("- no\n", "- no\nnew_version: org/unlearned-sage\n")
    assert proposed["README.md"].decode() == expected
    main_files = on_hub.files("org/unlearned")
    assert main_files["README.md"].decode() == CARD
    assert proposed.keys() == main_files.keys()
    # The same command finds the release and the pull request, and makes neither again.
    assert main(words) == 0
    assert len(proposals(on_hub)) == 1
    assert len(on_hub.commits("org/unlearned-sage")) == 2


def test_it_is_never_done_unasked(on_hub: LoopbackHub, words: list[str]) -> None:
    assert main(words[:-1]) == 0
    assert proposals(on_hub) == []


def test_a_card_that_says_it_already_is_left_alone(on_hub: LoopbackHub, words: list[str]) -> None:
    card = CARD.replace("language", "new_version: org/unlearned-sage\nlanguage")
    on_hub.add_commit("org/unlearned", {"README.md": card.encode()})
    assert main(words) == 0
    assert proposals(on_hub) == []


def test_a_repo_without_a_card_gets_one(on_hub: LoopbackHub, pair: Path) -> None:
    assert "README.md" not in on_hub.files("org/unlearned")
    assert main(push(pair)) == 0
    proposed = on_hub.files("org/unlearned", "refs/pr/1")
    assert proposed["README.md"] == b"---\nnew_version: org/unlearned-sage\n---\n"


def test_anybody_may_propose(
    on_hub: LoopbackHub, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_HUB_WRITE_TOKEN", "hf_stranger")
    assert main([*words, "--to", "mallory/out"]) == 0
    assert proposals(on_hub) == [("New version: mallory/out", "mallory")]


@pytest.mark.parametrize("status, code", [(403, 11), (500, 25), (400, 25)])
def test_a_release_is_not_lost_by_its_announcement(
    status: int,
    code: int,
    on_hub: LoopbackHub,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_hub.fail("POST", "/org/unlearned/commit/", status, times=20)
    assert main([*words, "--json"]) == code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["location"].startswith(f"{on_hub.url}/org/unlearned-sage/commit/")
    assert "The release is published" in shown.err
    assert "only its announcement on org/unlearned failed; the same command" in shown.err
    assert "sage/manifest.json" in on_hub.files("org/unlearned-sage")
    on_hub.calm()
    assert main(words) == 0
    assert len(proposals(on_hub)) == 1
    assert len(on_hub.commits("org/unlearned-sage")) == 2


def test_an_answer_that_is_lost_opens_no_second_one(on_hub: LoopbackHub, words: list[str]) -> None:
    on_hub.disturb("POST", "/org/unlearned/commit/", "lost")
    assert main(words) == 0
    assert len(proposals(on_hub)) == 1


@pytest.mark.parametrize(
    "more, status, says",
    [
        ("--create-pr", 2, "--announce and --create-pr exclude each other"),
        ("--branch trial", 2, "--announce and --branch exclude each other"),
        ("--to ./here", 2, "--announce is for a repo of the Hub, and the target is a local one"),
        ("--to org/unlearned --force", 2, "is the unlearned model's own repo"),
        ("--private", 2, "which is private, on org/unlearned, which is not"),
        ("--token hf_fine", 0, ""),
        ("--token hf_narrow --to org/one", 11, "may open no pull request on org/unlearned"),
    ],
)
def test_what_cannot_be_announced_is_refused_in_the_plan(
    more: str,
    status: int,
    says: str,
    on_hub: LoopbackHub,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_hub.add_repo("org/one", {})
    assert main([*words, *more.split(), "--dry-run"]) == status
    assert says in capsys.readouterr().err
    assert proposals(on_hub) == []


def test_a_source_that_is_no_repo_is_refused(
    words: list[str], pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words[2] = str(pair / "unlearned")
    assert main([*words, "--to", "org/out", "--dry-run"]) == 2
    assert "--announce is for an unlearned model on the Hub" in capsys.readouterr().err


def test_one_model_of_several_in_a_repo_is_refused(
    on_hub: LoopbackHub, words: list[str], pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {
        f"{side}/{path.name}": path.read_bytes()
        for side in ("a", "b")
        for path in (pair / "unlearned").iterdir()
    }
    on_hub.add_repo("org/many", both)
    words[2] = "org/many/a"
    assert main([*words, "--dry-run"]) == 2
    assert "--announce speaks for all of org/many" in capsys.readouterr().err


def test_a_private_release_of_a_public_model_is_refused(
    on_hub: LoopbackHub, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.add_repo("org/hidden", {}, private=True)
    assert main([*words, "--to", "org/hidden", "--dry-run"]) == 2
    assert "which is private" in capsys.readouterr().err


@pytest.mark.parametrize(
    "card", [b"---\n[a]\n---\n", b"---\n{a: 1}\n---\n", b"---\na: [\n---\n", b"\xff\xfe\x00\xd8"]
)
def test_a_card_that_takes_no_line_is_refused(
    card: bytes, on_hub: LoopbackHub, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.add_commit("org/unlearned", {"README.md": card})
    assert main([*words, "--dry-run"]) == 2
    assert "cannot be changed by a line; leave --announce away" in capsys.readouterr().err


@pytest.mark.parametrize(
    "card",
    ["", "# A model\n", "---\n---\n# A model\n", CARD, CARD.replace("\n", "\r\n"), "---\n\n---\n"],
)
def test_all_else_of_a_card_stays(card: str) -> None:
    new = with_field(card, "new_version", "org/out")
    assert ModelCard(new).data.to_dict()["new_version"] == "org/out"
    assert new.endswith(card.rpartition("---")[2])
    assert with_field(new, "new_version", "org/out") == new
    other = with_field(new, "new_version", "org/another")
    assert other == new.replace("org/out", "org/another")
    assert ("\r\n" in card) == ("\r\n" in new)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=4), st.text(max_size=30))
def test_no_card_is_broken(stated: dict[str, str], text: str) -> None:
    """What is not refused says all that it said before, and the release."""
    card = f"---\n{yaml.safe_dump(stated)}---\n{text}"
    try:
        new = with_field(card, "new_version", "org/out")
    except (ValueError, yaml.YAMLError):
        return
    front = new.split("\n---", 1)[0].removeprefix("---\n")
    assert yaml.safe_load(front) == {**stated, "new_version": "org/out"}
    assert new.endswith(text)
