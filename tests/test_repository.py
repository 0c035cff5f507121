"""The files that GitHub, pre-commit, the `hf` client and citing people read of this repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sage_hub

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "schema, files",
    [
        ("vendor.github-issue-forms", "[!c]*.yml"),
        ("vendor.github-issue-config", "config.yml"),
    ],
)
def test_github_takes_the_issue_templates(schema: str, files: str) -> None:
    found = [*map(str, (ROOT / ".github" / "ISSUE_TEMPLATE").glob(files))]
    assert found
    check = [str(BIN / "check-jsonschema"), "--builtin-schema", schema, *found]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_before_a_commit_runs_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    checks = re.findall(r"^\.venv/bin/(?:ruff|mypy|lint-imports).*$", ci, re.MULTILINE)
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    assert sorted(hook["entry"] for hook in repo["hooks"]) == sorted(checks)
    assert all(hook["language"] == "system" for hook in repo["hooks"])


def test_the_citation_is_of_this_version() -> None:
    about = read("CITATION.cff")
    assert about["version"] == sage_hub.__version__
    assert {"cff-version", "message", "title", "authors"} <= about.keys()


def test_only_the_job_that_publishes_may_do_so() -> None:
    workflow = read(".github/workflows/publish.yml")
    assert workflow["permissions"] == {}
    build, publish = (workflow["jobs"][name] for name in ("build", "publish"))
    assert build["permissions"] == {"contents": "read"}
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert not any("run" in step for step in publish["steps"]), "no code of ours with that right"
