"""The files that GitHub, pre-commit, the `hf` client and citing people read of this repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.cli import extensions
from huggingface_hub.cli._uv_script_header import parse_uv_script_header
from support.loopback_hub import LoopbackHub

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


# `hf sage`, and a script for `hf jobs uv run`


def scripts() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]")[2].partition("\n[")[0]
    return dict(re.findall(r'^([\w-]+) = "(.*?)"', section, re.MULTILINE))


def test_hf_sage_is_sage_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client's own dispatch, to an extension as it installs a package."""
    declared = scripts()
    assert declared["hf-sage"] == declared["sage-hub"]
    module, _, function = declared["hf-sage"].partition(":")
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    folder = tmp_path / "hf-sage"
    folder.mkdir()
    script = folder / extensions._get_executable_name("sage")
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from {module} import {function}\nsys.exit({function}())\n"
    )
    script.chmod(0o755)
    about = {"owner": "o", "repo": "hf-sage", "repo_id": "o/hf-sage", "short_name": "sage"}
    about |= {"executable_path": str(script), "type": "python"}
    about |= {"installed_at": "2026-01-01T00:00:00+00:00"}
    (folder / extensions.MANIFEST_FILENAME).write_text(json.dumps(about))
    run = extensions.dispatch_unknown_top_level_extension
    assert run(["sage", "--version"], {"download", "jobs"}) == 0
    assert capfd.readouterr().out == f"sage-hub {sage_hub.__version__}\n"
    assert run(["sage", "psh", "a", "b"], {"download", "jobs"}) == 2


JOB = ROOT / "docs" / "examples" / "sage_job.py"


def test_the_head_of_the_job_script_is_one_that_hf_reads() -> None:
    header = parse_uv_script_header(JOB.read_text(encoding="utf-8"))
    assert header is not None
    assert header.secrets == ["HF_TOKEN"]
    assert header.flavor
    assert header.timeout
    text = JOB.read_text(encoding="utf-8")
    assert re.search(r'^# dependencies = \["sage-hub"\]$', text, re.MULTILINE)
    (needs,) = re.findall(r'^# requires-python = "(.*)"$', text, re.MULTILINE)
    assert f'requires-python = "{needs}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_body_of_the_job_script_publishes(on_hub: LoopbackHub, pair: Path) -> None:
    words = ["org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl")]
    done = subprocess.run(
        [sys.executable, str(JOB), *words, "--generate-rows", "0", "--gain", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["location"].startswith(f"{on_hub.url}/org/unlearned-sage/")


def test_the_skill_is_short_and_says_what_can_be_typed() -> None:
    text = (ROOT / "SKILL.md").read_text(encoding="utf-8")
    front, body = re.fullmatch("---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    about = yaml.safe_load(front)
    assert about["name"] == "sage-hub"
    assert 0 < len(about["description"]) < 1024
    assert len(body.splitlines()) < 50
    assert "sage-hub data " in body
