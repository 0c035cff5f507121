"""The composite action and the workflows: valid, safe, and run as GitHub's runner would run them.

`Runner` reads action.yml, fills in the inputs, and runs each shell step with the command line, the
environment and the files that the runner gives it. The libraries come from the environment of the
tests; SAGE_HUB_CLEAN_VENV=1 has the action install them all, which takes minutes and a network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.loopback_hub import LoopbackHub
from support.runner import literal, read_outputs

from sage_hub.checkpoint.location import parse_location
from sage_hub.cli.config import load_settings
from sage_hub.cli.given import given_of
from sage_hub.cli.parser import make_parser, parse
from sage_hub.commands.survey import choose_target
from sage_hub.settings import SETTINGS, Settings

ROOT = Path(__file__).parents[2]
ACTION = ROOT / ".github" / "actions" / "sage-hub" / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent
CLEAN = bool(os.environ.get("SAGE_HUB_CLEAN_VENV"))
EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")

# The interpreter that setup-python would have put on the PATH. To a venv that it makes it lends
# the libraries of the tests, so that nothing has to be downloaded.
PYTHON = """#!/bin/sh
{real} "$@" || exit $?
if [ "$1 $2" = "-m venv" ] && [ -n "{lent}" ]; then
  for site in "$3"/lib/python*/site-packages; do echo "{lent}" > "$site/lent.pth"; done
fi
"""


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


@dataclass
class Runner:
    """GitHub's runner, as far as a composite action of shell steps needs it."""

    temp: Path
    workspace: Path
    environment: dict[str, str]
    log: str = ""
    summary: str = ""
    steps: dict[str, dict[str, str]] = field(default_factory=dict)

    def run(self, *, skip: tuple[str, ...] = (), **given: str) -> int:
        """Run the action's shell steps with these inputs (`create_pr` for `create-pr`).

        Returns the status of the first step that fails, else 0.
        """
        action = read(ACTION)
        inputs = {name: str(about.get("default", "")) for name, about in action["inputs"].items()}
        inputs |= {name.replace("_", "-"): value for name, value in given.items()}
        assert inputs.keys() == action["inputs"].keys(), "no such input"
        for step in action["runs"]["steps"]:
            if "uses" in step or step["id"] in skip:
                continue
            assert step["shell"] == "bash"
            status, outputs = self._run_step(step, inputs)
            self.steps[step["id"]] = outputs
            if status:
                return status
        return 0

    def outputs(self) -> dict[str, str]:
        """The outputs of the action."""
        named = read(ACTION)["outputs"]
        return {name: self._fill(about["value"], {}) for name, about in named.items()}

    def _run_step(self, step: dict[str, Any], inputs: dict[str, str]) -> tuple[int, dict[str, str]]:
        files = {}
        for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV", "GITHUB_PATH"):
            files[name] = self.temp / f"{name}-{step['id']}"
            files[name].write_text("")
        script = self.temp / f"{step['id']}.sh"
        script.write_text(step["run"], encoding="utf-8")
        own = {name: self._fill(value, inputs) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace,
            env={**self.environment, **{name: str(path) for name, path in files.items()}, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        self.log += done.stdout + done.stderr
        self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        assert files["GITHUB_ENV"].read_text() == files["GITHUB_PATH"].read_text() == ""
        return done.returncode, read_outputs(files["GITHUB_OUTPUT"].read_text())

    def _fill(self, text: str, inputs: dict[str, str]) -> str:
        """`text` with its expressions replaced, of which the action uses two kinds."""

        def value(found: re.Match[str]) -> str:
            kind, *path = found[1].split(".")
            if kind == "inputs":
                return inputs[path[0]]
            assert (kind, path[1]) == ("steps", "outputs"), found[0]
            return self.steps.get(path[0], {}).get(path[2], "")

        return EXPRESSION.sub(value, text)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The outputs of the steps that install sage-hub, which are run once."""
    runner = make_runner(tmp_path_factory.mktemp("install"))
    lent = "" if CLEAN else sysconfig.get_path("purelib")
    tools = runner.temp / "tools"
    tools.mkdir()
    (tools / "python").write_text(PYTHON.format(real=sys.executable, lent=lent))
    (tools / "python").chmod(0o755)
    runner.environment["PATH"] = f"{tools}:{runner.environment['PATH']}"
    more = {"extra_index_url": ""}  # the machine's own index
    if not CLEAN:
        runner.environment |= {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    status = runner.run(skip=("push",), base="a", unlearned="b", **more)
    assert status == 0, runner.log
    assert "sage-hub" in runner.log
    return runner.steps


def make_runner(folder: Path) -> Runner:
    places = {name: folder / name for name in ("temp", "workspace", "home")}
    for place in places.values():
        place.mkdir(parents=True)
    kept = ("PATH", "HF_ENDPOINT", "HF_HUB_DISABLE_TELEMETRY", "LANG", "PIP_INDEX_URL")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "CI": "true",
        "GITHUB_ACTIONS": "true",
        "GITHUB_ACTION_PATH": str(ACTION.parent),
        "GITHUB_WORKSPACE": str(places["workspace"]),
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(places["home"]),
        "OMP_NUM_THREADS": "1",
        "RUNNER_TEMP": str(places["temp"]),
    }
    return Runner(places["temp"], places["workspace"], environment)


@pytest.fixture
def runner(installed: dict[str, dict[str, str]], tmp_path: Path) -> Runner:
    made = make_runner(tmp_path / "runner")
    made.steps = dict(installed)
    return made


def push(runner: Runner, pair: Path, **inputs: str) -> int:
    for name in ("retain", "forget", "heldout"):
        (runner.workspace / f"{name}.jsonl").write_bytes((pair / f"{name}.jsonl").read_bytes())
    settings = "retain: retain.jsonl\nforget: forget.jsonl\nheldout: heldout.jsonl\n"
    settings += "generate_rows: 0\ngain: match\n"  # the action does the same whatever they are
    (runner.workspace / "sage.yaml").write_text(settings)
    return runner.run(
        skip=("source", "install"),
        **{"base": "org/base", "unlearned": "org/unlearned", "token": "hf_writer", **inputs},
    )


def test_success(runner: Runner, on_hub: LoopbackHub, pair: Path) -> None:
    assert push(runner, pair, low_disk="false", strength="3") == 0, runner.log
    outputs = runner.outputs()
    assert outputs["commit-url"].endswith(on_hub.commits("org/unlearned-sage")[-1].sha)
    assert (outputs["pr-url"], outputs["gates"], outputs["status"]) == ("", "none", "0")
    report = json.loads(Path(outputs["report"]).read_text())
    recovered = report["retain_recovered"]  # none where unlearning cost nothing that is certain
    assert outputs["heldout-recovered"] == (f"{recovered['value']:.6g}" if recovered else "")
    assert 0 < float(outputs["forget-probability-before"]) < 1
    record = Path(outputs["record"])
    published = on_hub.files("org/unlearned-sage")
    for name in ("README.md", "sage/manifest.json", "sage/report.json"):
        assert (record / name).read_bytes() == published[name]
    assert json.loads(published["sage/manifest.json"])["settings"]["strength"] == 3
    assert json.loads((record / "release.json").read_text())["location"] == outputs["location"]
    assert "| heldout | probability | higher |" in runner.summary
    assert "hf_writer" not in runner.log + runner.summary
    assert "::error" not in runner.log


def test_pull_request_with_the_defaults_of_a_runner(
    runner: Runner, on_hub: LoopbackHub, pair: Path
) -> None:
    assert push(runner, pair, create_pr="true") == 0, runner.log
    outputs = runner.outputs()
    assert "/discussions/1" in outputs["pr-url"]
    assert outputs["commit-url"] == ""
    manifest = json.loads(on_hub.files("org/unlearned-sage", "refs/pr/1")["sage/manifest.json"])
    assert manifest["settings"]["low_disk"] is True
    assert manifest["settings"]["memory"] == 12
    assert set(on_hub.files("org/unlearned-sage")) == {".gitattributes"}
    assert "| heldout | probability | higher |" in runner.summary  # low disk evaluates too


def test_missing_token(runner: Runner, on_hub: LoopbackHub, pair: Path) -> None:
    assert push(runner, pair, token="") == 11
    assert "::error title=sage-hub::" in runner.log
    assert "HF_TOKEN" in literal(runner.summary)
    outputs = runner.outputs()
    assert outputs["status"] == "11"
    assert outputs["report"] == outputs["commit-url"] == ""
    assert ("org/unlearned-sage", "model") not in on_hub.repos


def test_a_gate_that_fails_with_the_defaults_of_a_runner(
    runner: Runner, on_hub: LoopbackHub, pair: Path
) -> None:
    gates = "heldout.probability >= 0\nheldout.probability >= 2\n"
    assert push(runner, pair, gates=gates) == 30, runner.log
    outputs = runner.outputs()
    assert (outputs["gates"], outputs["status"]) == ("failed", "30")
    assert Path(outputs["report"]).is_file()
    assert "**Gates**: 1 of 2 failed." in runner.summary
    assert "::error title=sage-hub::" in runner.log
    assert "sage/manifest.json" not in on_hub.files("org/unlearned-sage")


def test_models_that_do_not_fit_the_runner_are_refused_before_any_work(
    runner: Runner, on_hub: LoopbackHub, pair: Path
) -> None:
    assert push(runner, pair, memory="0.5") == 26
    assert "::error title=sage-hub::Calibration takes" in runner.log
    assert ("org/unlearned-sage", "model") not in on_hub.repos


@pytest.fixture
def recorder(tmp_path: Path) -> Runner:
    """A runner in which sage-hub only writes down how it was called."""
    made = make_runner(tmp_path / "recorder")
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/sh\nprintf \'%s\\0\' "$@" > "$RUNNER_TEMP/words"\n'
        'printf %s "$HF_TOKEN/$HF_OIDC_RESOURCE/$SAGE_HUB_WRITE_TOKEN" > "$RUNNER_TEMP/auth"\n'
    )
    program.chmod(0o755)
    made.steps = {"install": {"program": str(program)}}
    return made


def words_of(runner: Runner, **inputs: str) -> list[str]:
    """How sage-hub is called, but for what is always there."""
    inputs = {"base": "org/a", "unlearned": "org/b", "low_disk": "", "memory": "", **inputs}
    assert runner.run(skip=("source", "install"), **inputs) == 0, runner.log
    words = (runner.temp / "words").read_text().split("\0")[:-1]
    assert words[:3] == ["push", "--yes", "--json"]
    assert words[3].startswith(f"--record={runner.temp}/")
    assert words[-3:] == ["--", inputs["base"], inputs["unlearned"]]
    return words[4:-3]


def test_what_is_not_given_is_not_passed(recorder: Runner) -> None:
    assert words_of(recorder) == []
    assert (recorder.temp / "auth").read_text() == "//"


def test_the_defaults_suit_a_hosted_runner(recorder: Runner) -> None:
    inputs = read(ACTION)["inputs"]
    given = {name: inputs[name.replace("_", "-")]["default"] for name in ("low_disk", "memory")}
    assert words_of(recorder, **given) == ["--low-disk", "--memory=12"]


def test_what_is_off_is_off_whatever_the_settings_file_says(recorder: Runner) -> None:
    assert words_of(recorder, low_disk="false") == ["--no-low-disk"]
    Path("sage.yaml").write_text("low_disk: true\n")
    for words, low_disk in (([], True), (["--no-low-disk"], False), (["--low-disk"], True)):
        args = parse(["push", "org/a", "org/b", *words])
        assert load_settings(given_of(args), config=None, unlearned=None)[0].low_disk is low_disk


@pytest.mark.parametrize(
    "to, unlearned",
    [
        ("", "org/unlearned"),
        ("", f"org/unlearned@{'a' * 40}"),
        ("", "org/unlearned@refs/pr/1"),
        ("", "org/unlearned/below/it@v1"),
        ("org/target", "org/unlearned@v1"),
    ],
)
def test_the_workflow_queues_by_the_target_that_sage_hub_chooses(
    to: str, unlearned: str, tmp_path: Path
) -> None:
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    (step,) = jobs["target"]["steps"]
    output = tmp_path / "output"
    places = {"TO": to, "UNLEARNED": unlearned, "GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-euc", step["run"]], env=os.environ | places, check=True)
    pair: Any = SimpleNamespace(
        unlearned=SimpleNamespace(files=SimpleNamespace(location=parse_location(unlearned)))
    )
    assert read_outputs(output.read_text())["name"] == choose_target(to or None, pair).repo
    assert "needs.target.outputs.name" in jobs["release"]["concurrency"]["group"]


def test_every_input_reaches_sage_hub_as_an_option_that_it_has(recorder: Runner) -> None:
    flags = {"create-pr", "private", "low-disk", "dry-run"}
    elsewhere = {
        "base",
        "unlearned",
        "token",
        "write-token",
        "oidc-resource",
        "python-version",
        "version",
    }
    elsewhere |= {"extra-index-url", "extra-args", "gates"}
    given, expected = {}, []
    for name in read(ACTION)["inputs"]:
        if name in flags:
            given[name.replace("-", "_")] = "true"
            expected.append(f"--{name}")
        elif name not in elsewhere:
            given[name.replace("-", "_")] = f"the {name}"
            expected.append(f"--{name}=the {name}")
    given["gates"] = "forget.probability <= 0.1\n\nheldout.probability >= base - 0.02"
    expected += ["--gate=forget.probability <= 0.1", "--gate=heldout.probability >= base - 0.02"]
    given["extra_args"] = "--max-tokens=50000\n--out-dtype=bfloat16\n"
    expected += ["--max-tokens=50000", "--out-dtype=bfloat16"]
    given |= {"token": "hf_x", "oidc_resource": "org/target", "write_token": "hf_w"}
    assert sorted(words_of(recorder, **given)) == sorted(expected)
    assert (recorder.temp / "auth").read_text() == "hf_x/org/target/hf_w"
    known = {name for action in make_parser()[1]["push"]._actions for name in action.option_strings}
    # The versions that have gates have the option.
    missing = {word.partition("=")[0] for word in expected} - known
    assert missing == set()


def test_the_inputs_that_are_settings_agree_with_their_declarations() -> None:
    inputs = {n.replace("-", "_"): about for n, about in read(ACTION)["inputs"].items()}
    shared = inputs.keys() & SETTINGS.keys()
    assert {"retain", "forget", "heldout", "strength", "gain", "gates", "low_disk"} <= shared
    script = read(ACTION)["runs"]["steps"][-1]["run"]
    for name in shared:
        setting = SETTINGS[name]
        how = {"boolean": "switch ", "array": "lines "}.get(
            setting.kind.schema.get("type"), "option "
        )
        called = f"{setting.option}{'=' if how == 'lines ' else ''}"
        assert f'{how}{called} "$INPUT_{name.upper()}"\n' in script
        assert setting.help.casefold() in inputs[name]["description"].casefold()
        if default := inputs[name]["default"]:
            Settings(**{name: yaml.safe_load(default)})  # type: ignore[arg-type]
    # Whatever else the script passes is an option of push too, a flag where it is one.
    options = make_parser()[1]["push"]._option_string_actions
    passed = re.findall(r"^(option|flag|switch|lines) (--[a-z-]+)", script, re.MULTILINE)
    assert {option for _, option in passed} >= {SETTINGS[name].option for name in shared}
    for how, option in passed:
        assert (options[option].nargs == 0) is (how in ("flag", "switch")), option


def test_a_token_of_the_job_is_left_as_it_is(recorder: Runner) -> None:
    recorder.environment["HF_TOKEN"] = "hf_job"
    assert words_of(recorder) == []
    assert (recorder.temp / "auth").read_text() == "hf_job//"


@pytest.mark.parametrize(
    "text",
    [
        "$(touch pwned)",
        "`touch pwned`",
        '"; touch pwned; "',
        "'; touch pwned; '",
        "a b  c*",
        "--force",
        "\\",
        "${HOME}",
        "x\ny=1\n::error::",
    ],
)
def test_an_input_is_never_code(recorder: Runner, text: str) -> None:
    assert words_of(recorder, to=text, retain=text, base=text, unlearned=text) == [
        f"--to={text}",
        f"--retain={text}",
    ]
    assert list(recorder.workspace.iterdir()) == []
    assert recorder.log == ""


def test_a_flag_is_true_or_false(recorder: Runner) -> None:
    assert words_of(recorder, private="false", create_pr="") == []
    inputs = {"base": "org/a", "unlearned": "org/b", "create_pr": "yes"}
    assert recorder.run(skip=("source", "install"), **inputs) == 2
    assert "::error title=sage-hub::The input create-pr must be true or false." in recorder.log


def test_the_shell_has_no_expressions_and_third_parties_are_pinned() -> None:
    files = [ACTION, *WORKFLOWS]
    assert len(files) == 6
    pins: dict[str, set[str]] = {}
    for file in files:
        content = read(file)
        jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
        for step in (step for job in jobs for step in job["steps"]):
            assert "${{" not in step.get("run", ""), step
        for line in file.read_text(encoding="utf-8").splitlines():
            if "uses:" in line and "$/" not in line:
                pin = re.search(r"uses: ([\w.-]+/[\w.-]+)[\w./-]*@([0-9a-f]{40} # v[\d.]+)$", line)
                assert pin is not None, line
                assert re.search(r"v\d+\.\d+\.\d+$", pin[2]), line
                pins.setdefault(pin[1], set()).add(pin[2])
    assert [action for action, commits in pins.items() if len(commits) > 1] == []


def test_the_workflow_gives_the_action_what_it_takes() -> None:
    workflow, action = read(ROOT / ".github" / "workflows" / "release.yml"), read(ACTION)
    triggers = workflow[True]  # YAML takes the key `on` for a truth
    assert triggers["workflow_dispatch"]["inputs"] == triggers["workflow_call"]["inputs"]
    job = workflow["jobs"]["release"]
    assert job["permissions"] == {"contents": "read", "id-token": "write"}
    assert workflow["permissions"] == {}
    (step,) = (step for step in job["steps"] if step.get("uses", "").startswith("$/"))
    assert (ROOT / step["uses"].removeprefix("$/") / "action.yml").samefile(ACTION)
    assert step["with"].keys() <= action["inputs"].keys()
    required = {name for name, about in action["inputs"].items() if about.get("required")}
    assert required <= step["with"].keys()
    for name in triggers["workflow_call"]["inputs"]:
        assert f"inputs.{name}" in json.dumps(job), name
    for value in job["outputs"].values():
        assert value.split(".")[-1].strip("} ") in action["outputs"]


@pytest.mark.parametrize(
    "words",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.github-actions", str(ACTION)],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)],
        ["zizmor", "--offline", "--persona", "pedantic", "--no-config", str(ROOT / ".github")],
    ],
    ids=["actions", "workflows", "zizmor"],
)
def test_checkers_find_nothing(words: list[str]) -> None:
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
