"""The recipes of docs/pipelines.md, run as they stand there, as far as that goes here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.loopback_hub import LoopbackHub

from sage_hub.errors import NetworkError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"<!-- recipe: ([\w-]+) -->\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL))
SHA = "0" * 40

# What is tried again is tried again at once.
PROGRAM = """#!{python}
import sys
from sage_hub.cli import main as cli
from sage_hub.hub import client as hub
hub.WAITS = tuple(0.01 for _ in hub.WAITS)
sys.exit(cli.main())
"""


class Shell:
    """A machine with bash and sage-hub on it, and a Hub that is this test's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "machine"
        tools, home = folder / "tools", folder / "home"
        for made in (self.folder, tools, home):
            made.mkdir()
        self.program = tools / "sage-hub"
        self.program.write_text(PROGRAM.format(python=sys.executable))
        (tools / "sleep").write_text('#!/bin/sh\necho "$1" >> slept\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "OMP_NUM_THREADS": "1",
        }

    def replace_program(self, script: str) -> None:
        """From now on sage-hub is that."""
        self.program.write_text(f"#!/bin/sh\n{script}\n")

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def shell(tmp_path: Path, pair: Path) -> Shell:
    made = Shell(tmp_path)
    for name in ("retain", "forget", "heldout"):
        shutil.copy(pair / f"{name}.jsonl", made.folder)
    (made.folder / "sage.yaml").write_text(
        "retain: retain.jsonl\nforget: forget.jsonl\nheldout: heldout.jsonl\n"
        "generate_rows: 0\ngain: match\n"
    )
    return made


def check_release(hub: LoopbackHub) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(hub.files("org/unlearned-sage")["sage/manifest.json"])
    assert manifest["bias"]["after"] < manifest["bias"]["before"]
    return manifest


def test_the_page_has_a_recipe_for_each_and_says_how_far_it_was_run() -> None:
    assert set(RECIPES) == {"call", "action", "gitlab", "cron", "jobs", "open-unlearning"}
    sections = PAGE.split("\n## ")[1:]
    assert len(sections) == 6
    for section in sections:
        assert "*How far this was run:*" in section, section.splitlines()[0]


@pytest.mark.parametrize("recipe", ["call", "action"])
def test_github_takes_the_workflows(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / ".github" / "workflows" / "release.yml"
    file.parent.mkdir(parents=True)
    file.write_text(RECIPES[recipe].replace("COMMIT\n", f"{SHA} # v0.1.0\n"))
    for words in (
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)],
        ["zizmor", "--offline", "--no-config", str(file)],
    ):
        done = subprocess.run(
            [str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_github_recipes_give_inputs_that_there_are() -> None:
    (job,) = yaml.safe_load(RECIPES["call"])["jobs"].values()
    called = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())[True]
    assert job["with"].keys() <= called["workflow_call"]["inputs"].keys()
    assert job["secrets"].keys() <= called["workflow_call"]["secrets"].keys()
    (job,) = yaml.safe_load(RECIPES["action"])["jobs"].values()
    action = yaml.safe_load((ROOT / ".github" / "actions" / "sage-hub" / "action.yml").read_text())
    (step,) = (step for step in job["steps"] if step.get("id") == "sage")
    assert step["with"].keys() <= action["inputs"].keys()
    for output in re.findall(r"steps\.sage\.outputs\.([\w-]+)", RECIPES["action"]):
        assert output in action["outputs"]


def test_gitlab(shell: Shell, on_hub: LoopbackHub, tmp_path: Path) -> None:
    file = tmp_path / ".gitlab-ci.yml"
    file.write_text(RECIPES["gitlab"])
    check = ["check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", str(file)]
    done = subprocess.run(
        [str(BIN / check[0]), *check[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = yaml.safe_load(RECIPES["gitlab"]).values()
    done = shell.run("set -eo pipefail\n" + "\n".join(job["script"]))
    assert done.returncode == 0, done.stderr
    assert check_release(on_hub)["settings"]["low_disk"] is True
    for path in (*job["artifacts"]["paths"], "record/sage/report.json", ".cache/statistics"):
        assert (shell.folder / path).exists(), path
    assert json.loads((shell.folder / "release.json").read_text())["location"]


def test_cron(shell: Shell, on_hub: LoopbackHub) -> None:
    (shell.folder / "token").write_text("hf_writer\n")
    here = {"SAGE_HOME": str(shell.folder), "HF_TOKEN": ""}
    done = shell.run(RECIPES["cron"], **here)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_release(on_hub)
    assert not (shell.folder / "slept").exists()
    shell.replace_program(f"echo nobody there >&2; exit {NetworkError.status}")
    done = shell.run(RECIPES["cron"], **here)
    assert (done.returncode, done.stderr) == (NetworkError.status, "nobody there\n")
    assert (shell.folder / "slept").read_text().split() == ["600", "3600", "0"]


def test_jobs(shell: Shell, on_hub: LoopbackHub) -> None:
    words = shlex.split(RECIPES["jobs"].replace("\\\n", " "))
    assert words[:3] == ["hf", "jobs", "run"]
    dry = shell.run(shlex.join([*words[:3], "--dry-run", *words[3:]]))
    assert dry.returncode == 0, dry.stdout + dry.stderr
    script = words[-1]
    install, push = script.split("&&")
    assert install.split()[:2] == ["pip", "install"]
    proxies = shell.folder / "proxies"
    proxies.mkdir()
    for name in ("sage.yaml", "retain.jsonl", "forget.jsonl", "heldout.jsonl"):
        (shell.folder / name).rename(proxies / name)
    done = shell.run(push.replace("/proxies/", f"{proxies}/"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["location"]
    check_release(on_hub)


def test_open_unlearning(shell: Shell, hub: LoopbackHub, pair: Path) -> None:
    hub.add_repo("org/base", pair / "base")
    sets = {"retain90": "retain", "forget10": "forget", "real_authors": "heldout"}
    files: dict[str, bytes] = {
        f"{name}.json": (pair / f"{which}.jsonl").read_bytes() for name, which in sets.items()
    }
    configs = [{"config_name": name, "data_files": f"{name}.json"} for name in sets]
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    hub.add_repo("org/TOFU", files, "dataset")
    tasks = shell.folder / "saves" / "unlearn"
    own = {
        "training_args.bin": "a pickle",
        "trainer_state.json": "of the training, not of the model",
        "checkpoint-10/tokenizer.json": "of the training, not of the model",
        "logs/events.out.tfevents.1": "of the training, not of the model",
        "evals/TOFU_EVAL.json": "results of another model than the release",
        "evals/TOFU_SUMMARY.json": "results of another model than the release",
        ".hydra/config.yaml": "a hidden file",
    }
    methods = ("NPO", "GradDiff")
    for method in methods:
        task = tasks / f"tofu_Llama-3.2-1B-Instruct_forget10_{method}"
        shutil.copytree(pair / "unlearned", task)
        for name in own:
            (task / name).parent.mkdir(exist_ok=True)
            (task / name).write_text("{}")
    where = {"BASE": "org/base", "TOFU": "hf://datasets/org/TOFU"}
    (tasks / "tofu_Llama-3.2-1B-Instruct_forget10_RMU-sage").mkdir()  # of an earlier run
    done = shell.run(RECIPES["open-unlearning"], **where)
    assert done.returncode == 0, done.stderr
    assert len(list((shell.folder / "saves" / "sage-statistics").iterdir())) == 1
    for method in methods:
        release = f"tofu_Llama-3.2-1B-Instruct_forget10_{method}-sage"
        manifest = json.loads((tasks / release / "sage" / "manifest.json").read_text())
        assert {name: manifest["left_behind"][name] for name in own} == own
        for name in own:
            assert not (tasks / release / name).exists()
        report = json.loads((tasks / release / "sage" / "report.json").read_text())
        assert {result["set"] for result in report["results"]} == {"retain", "forget", "heldout"}
