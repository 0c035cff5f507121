"""What a card inherits: read whatever its encoding, and never what the Hub would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import BOMB
from support.loopback_hub import LoopbackHub

from sage_hub.checkpoint.files import LocalFiles
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.cli.main import main
from sage_hub.publish.target import readme_rule
from sage_hub.record.metadata import inherited, languages, licences, metadata_warnings

CARD = "---\nlicense: mit\nlanguage:\n- nb\n---\n# Straße\n"


def plan_of(folder: Path, unlearned: bytes | str, base: bytes | str = "") -> Any:
    sides = {"base": base, "unlearned": unlearned}
    for side, card in sides.items():
        (folder / side).mkdir(exist_ok=True)
        content = card if isinstance(card, bytes) else card.encode()
        (folder / side / "README.md").write_bytes(content)
    return SimpleNamespace(**{s: Checkpoint(LocalFiles(folder / s), {}) for s in sides})


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"]
)
def test_a_card_is_read_in_any_encoding(encoding: str, newline: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, CARD.replace("\n", newline).encode(encoding))
    assert inherited(plan) == {"license": "mit", "language": ["nb"]}
    assert metadata_warnings(plan) == []


@pytest.mark.parametrize(
    "card, says",
    [
        ("---\nlicense: [\n---\n", "has metadata that cannot be read (while parsing"),
        ("---\n- mit\n---\n", "has metadata that cannot be read ("),
        (b"\xff\xfe\x00\xd8", "has metadata that cannot be read ('utf-16"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (f"---\n{BOMB}language: *i\n---\n", "has metadata that cannot be read (an alias is not"),
        (f"---\na: {'x' * 1_000_000}\n---\n", "has metadata that cannot be read (it is longer"),
    ],
)
def test_what_cannot_be_read_is_said(card: bytes | str, says: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, card, base="---\nlicense: mit\n---\n")
    assert inherited(plan) == {"license": "mit"}
    (warning,) = metadata_warnings(plan)
    assert warning.startswith(f"README.md of the unlearned side (unlearned) {says}")


@pytest.mark.parametrize("card", ["", "# No metadata\n", "---\n---\n"])
def test_a_card_that_says_nothing_is_no_matter(card: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, card)
    assert (inherited(plan), metadata_warnings(plan)) == ({}, [])


@pytest.mark.parametrize(
    "stated, taken, says",
    [
        ({"license": "eupl-1.2"}, {}, "no license: the sources' is 'eupl-1.2'"),
        ({"license": "MIT"}, {"license": "mit"}, ""),
        ({"license": ["mit", "gpl-3.0"]}, {"license": ["mit", "gpl-3.0"]}, ""),
        ({"license": ["mit", "mine"]}, {}, "no license: the sources' is 'mine'"),
        ({"license": {"name": "mit"}}, {}, "no license: the sources' is no text"),
        ({"license": "other", "license_link": "LICENSE"}, {}, "with a license_name only"),
        (
            {"license": "other", "license_name": "mine"},
            {"license": "other", "license_name": "mine"},
            "",
        ),
        ({"language": "English"}, {}, "no language: the sources' is 'English'"),
        ({"language": ["en", "no", "en"]}, {"language": ["en", "no"]}, ""),
        ({"language": ["en", "zh-CN"]}, {"language": ["en"]}, "state 'zh-CN' as its language"),
        ({"language": ["zh-CN", "xx"]}, {}, "no language: the sources' is 'zh-CN'"),
        ({"language": "xx"}, {}, "no language: the sources' is 'xx'"),
        ({"language": ["yue", "code", "fre"]}, {"language": ["yue", "code", "fre"]}, ""),
        ({"language": ["en", ["de"]]}, {"language": ["en"]}, "the sources' is no text"),
        ({"pipeline_tag": ["a"]}, {}, "no pipeline_tag: the sources' is no text"),
    ],
)
def test_what_the_hub_would_refuse_is_left_out_and_said(
    stated: dict[str, Any], taken: dict[str, Any], says: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, f"---\n{json.dumps(stated)}\n---\n")
    assert inherited(plan) == taken
    warnings = metadata_warnings(plan)
    assert len(warnings) == bool(says)
    assert says in "".join(warnings)


values = st.one_of(st.text(max_size=9), st.lists(st.text(max_size=4), max_size=3))


@given(st.dictionaries(st.sampled_from(["license", "license_name", "language"]), values))
def test_no_card_states_what_the_hub_does_not_know(
    tmp_path_factory: pytest.TempPathFactory, stated: dict[str, Any]
) -> None:
    card = f"---\n{json.dumps(stated)}\n---\n"
    found = inherited(plan_of(tmp_path_factory.mktemp("sides"), card))
    for name, known in {"license": licences(), "language": languages()}.items():
        value = found.get(name, [])
        assert known >= {*(value if isinstance(value, list) else [value])}


def test_an_unknown_licence_costs_no_release(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.add_commit("org/unlearned", {"README.md": b"---\nlicense: eupl-1.2\n---\n"})
    both = ["push", "org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl"), "--yes"]
    assert main([*both, "--to", "org/out"]) == 0
    assert "The card states no license: the sources' is 'eupl-1.2'" in capsys.readouterr().err
    card = ModelCard(on_hub.files("org/out")["README.md"].decode())
    assert card.data.license is None
    assert card.data.base_model == ["org/base", "org/unlearned"]
    assert (card.data.base_model_relation, card.data.library_name) == ("merge", "transformers")
    assert "sage-hub" in card.data.tags


@pytest.mark.parametrize(
    "rules, rule",
    [
        ("*.bin filter=lfs diff=lfs merge=lfs -text\n", None),
        ("*.md filter=lfs diff=lfs merge=lfs -text\n", "*.md"),
        ("* filter=lfs\n*.md -filter -text\n", None),
        ("*.md !filter\nREADME.md filter=lfs\n", "README.md"),
        ("/README.md filter=lfs", "/README.md"),
        ("**/*.md filter=lfs", "**/*.md"),
        ("docs/*.md filter=lfs\n\n# a comment\n", None),
    ],
)
def test_a_readme_that_goes_to_lfs_is_recognized(rules: str, rule: str | None) -> None:
    assert readme_rule(rules) == rule


def test_a_target_that_sends_its_card_to_lfs_is_told_of(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.add_repo("org/out", {".gitattributes": b"*.md filter=lfs diff=lfs merge=lfs -text\n"})
    both = ["push", "org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl")]
    assert main([*both, "--to", "org/out", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "The .gitattributes of org/out sends README.md to LFS (*.md)" in said
