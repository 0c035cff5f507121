"""The house: the map in CONTRIBUTING is the tree, and no module outgrows a reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in (ROOT / "sage_hub").rglob("*/__init__.py"))


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.name))
def test_the_map_names_every_module_of_a_folder(package: Path) -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| `{package.name}/` \|.*\|(.*)\|$", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", line)) - {"sanitize"} == modules(package)


def test_the_map_names_what_lies_beside_the_folders() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(named) == sorted(modules(ROOT / "sage_hub"))


@pytest.mark.parametrize("folder", ["sage_hub", "tests/support"])
def test_no_module_is_longer_than_350_lines(folder: str) -> None:
    long = {
        path.name: lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 350
    }
    assert long == {}


def test_the_tests_that_the_docs_name_are_there() -> None:
    text = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+/test_\w+\.py)`", text))
    assert named
    assert {name for name in named if not (ROOT / "tests" / name).is_file()} == set()
