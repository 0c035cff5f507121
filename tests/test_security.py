"""SECURITY.md says what is so: each test that it names is there, and CI is as it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file, name", NAMED, ids=lambda part: part.rpartition("/")[2])
def test_each_test_that_it_names_is_there(file: str, name: str) -> None:
    found = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    names = {one.name for one in found if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
    assert not name or (name in names and name.lower().startswith("test"))


def test_each_line_of_its_tables_names_a_test_or_says_that_nothing_stops_it() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 40
    for row in rows:
        tried, happens, shown = (cell.strip() for cell in row.strip("|").split(" | "))
        if tried != "it tries":
            assert "`tests/" in shown or (shown == "none" and "*" in happens), row


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_pull_request_gets_no_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    triggers = workflow[True]  # what YAML 1.1 takes `on` for
    assert "pull_request_target" not in triggers
    assert "workflow_run" not in triggers
    if "pull_request" in triggers:
        assert "secrets." not in text
        assert all(job["permissions"] == {"contents": "read"} for job in workflow["jobs"].values())
