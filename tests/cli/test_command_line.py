"""The command line itself: help, mistakes, statuses, --json, completion, Ctrl-C, `env`."""

from __future__ import annotations

import getpass
import json
import platform
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub
from support.pico import make_pair, proxies

from sage_hub import errors
from sage_hub.cli import main as cli
from sage_hub.cli.main import main
from sage_hub.cli.parser import make_parser
from sage_hub.commands import survey as jobs
from sage_hub.publish.folder import Work, work_folder
from sage_hub.publish.verify import verify
from sage_hub.runtime import machine

COMMANDS = sorted(cli.COMMANDS)


def every_error(kind: type[errors.SageHubError]) -> Iterator[type[errors.SageHubError]]:
    for below in kind.__subclasses__():
        yield below
        yield from every_error(below)


def test_no_two_errors_share_a_status() -> None:
    ours = [kind.status for kind in every_error(errors.SageHubError)]
    assert len(ours) == len(set(ours))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal_and_has_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    examples = re.split("examples?:\n", shown)[1].split("\n\n")[0].replace("\\\n", " ")
    parser, commands = make_parser()
    assert set(commands) == set(COMMANDS)
    for line in examples.splitlines():
        program, *words = line.split()
        assert program == "sage-hub"
        assert parser.parse_args(words).command == words[0]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "COMMAND must be given. See `sage-hub --help`."),
        ("psh a b", "sage-hub has no command 'psh'; did you mean push?"),
        ("zzz", "sage-hub has no command 'zzz'; see `sage-hub --help`."),
        ("push", "BASE, UNLEARNED must be given. See `sage-hub push --help`."),
        ("push a b c", "Not understood: c. See `sage-hub --help`."),
        ("push a b --strenght=3", "sage-hub push has no option --strenght; did you mean --stre"),
        ("push a b --stren 3", "sage-hub push has no option --stren; did you mean --strength?"),
        ("sanitize a b --ouput x", "sage-hub sanitize has no option --ouput; did you mean --out"),
        ("push a b --zzz", "sage-hub push has no option --zzz; see `sage-hub push --help`."),
        (
            "push a b --strength x",
            "--strength must be a number of at least 0 or 'inf', not 'x'. See",
        ),
        ("push a b --rank 1.5", "--rank must be a whole number of at least 1, not '1.5'. See"),
        (
            "push a b --gain mach",
            "--gain must be a number above 0, 'match' or 'auto', not 'mach'. See",
        ),
        ("push a b --memory 8GB", "--memory must be a number above 0, not '8GB'. See"),
        ("push a b --seed=-1", "--seed must be a whole number of at least 0, not '-1'. See"),
        ("push a b --bystander x", "--bystander must be NAME=PROXY, not 'x'. See"),
        ("push a b --results x=", "--results must be MODEL=PATH, not 'x='. See"),
        ("audit a b --top=-1", "--top must be a whole number of at least 0, not '-1'. See"),
        ("sanitize a b --retain x --retain y", "--retain must be given once; put all rows into"),
        ("audit a b --heldout x", "sage-hub audit has no option --heldout; see `sage-hub audit"),
        ("push a b --moments exct", "--moments: invalid choice: 'exct' (choose from"),
        ("push a b --retain", "--retain: expected one argument. See `sage-hub push --help`."),
        ("stats a", "One of the arguments --output --to is required. See"),
        ("--quiet push a b", "sage-hub has no option --quiet; see `sage-hub --help`."),
        ("verify a\x1b[2J b", "Not understood: b. See"),
    ],
)
def test_what_is_mistyped_is_answered_in_a_sentence(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sage-hub: error: {sentence}")
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


def test_a_name_that_begins_with_a_dash_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--", "--no-such-release"]) == 2
    assert "'--no-such-release' is not a valid repo name" in capsys.readouterr().err


def json_commands(pair: Path, scratch: Path) -> dict[str, list[str]]:
    both, data = [str(pair / "base"), str(pair / "unlearned")], proxies(pair)
    release = str(scratch / "release")
    return {
        "sanitize": [*both, "--output", release, *data],
        "push": ["org/base", "org/unlearned", *data],
        "push --dry-run": [*both, *data],
        "verify": [release],
        "card": [release],
        "review": [release],
        "eval": [*both, *data[2:]],
        "plan": [*both, *data],
        "plan BASE": [both[0]],
        "data": data,
        "init": [*both, "--output", str(scratch / "settings.yaml")],
        "audit": [*both, *data[:4]],
        "stats": [both[0], *data[:2], "--output", str(scratch / "stats.safetensors")],
        "stats --to": [both[0], *data[:2], "--to", "org/stats"],
        "env": [],
    }


def test_json_is_one_object_and_nothing_else_on_stdout(
    on_hub: LoopbackHub, pair: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the file descriptor, so that a library's own print would be found too."""
    commands = json_commands(pair, tmp_path)
    for name, words in commands.items():
        command, *option = name.split()
        words = [*words, "--dry-run"] if option == ["--dry-run"] else words
        capfd.readouterr()
        assert main([command, *words, "--json"]) == 0, name
        out = capfd.readouterr().out
        assert isinstance(json.loads(out), dict), name
    tested = {name.split()[0] for name in commands}
    assert tested == set(COMMANDS) - {"demo"}  # test_demo.py has it


FAILURES = {
    "mistyped": ("psh a b", 2, "UsageError"),
    "mistyped option": ("push a b --zzz", 2, "UsageError"),
    "push": ("push org/nobody org/unlearned", 10, "NotFoundError"),
    "sanitize": ("sanitize ./nothing org/unlearned --output out", 10, "NotFoundError"),
    "plan": ("plan org/nobody", 10, "NotFoundError"),
    "stats": ("stats org/base --output . --retain x", 23, "TargetError"),
    "audit": ("audit org/base org/nobody", 10, "NotFoundError"),
    "eval": ("eval org/base", 2, "UsageError"),
    "card": ("card nothing", 10, "NotFoundError"),
    "verify": ("verify org/unlearned", 10, "NotFoundError"),
    "init": ("init org/nobody org/unlearned", 10, "NotFoundError"),
    "data": ("data nothing.jsonl", 10, "NotFoundError"),
    "review": ("review ./nothing", 10, "NotFoundError"),
    "demo": ("demo --output file", 23, "TargetError"),
    "env": ("env --output", 2, "UsageError"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.usefixtures("on_hub")
def test_json_is_one_object_of_a_failure_too(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    words, status, error = FAILURES[name]
    Path("file").write_text("")
    assert {*FAILURES} >= {*COMMANDS}
    assert main([*words.split(), "--json"]) == status
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert (found["status"], found["error"], found["kept"]) == (status, error, None)
    assert err.splitlines()[-1] == f"sage-hub: error: {found['message']}"


def test_a_bug_of_ours_is_one_object_too_and_no_token_is_in_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no hf_abcdefghijklmnopqrstuvwxyz12345678 here")

    monkeypatch.setitem(cli.COMMANDS, "env", fails)
    assert main(["env", "--json"]) == 1
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["error"] == "SageHubError"
    assert "(RuntimeError: no hf_… here)" in found["message"]
    assert "hf_abc" not in out + err


def test_a_result_that_is_refused_is_one_object_with_its_failure(
    pair: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    release = tmp_path / "release"
    both, data = [str(pair / "base"), str(pair / "unlearned")], proxies(pair)
    words = ["sanitize", *both, "--output", str(release), *data, "--json"]
    assert main([*words, "--gate", "gain > 100"]) == 30
    found = json.loads(capfd.readouterr().out)
    assert (found["status"], found["error"]) == (30, "GateError")
    assert found["location"] == str(release)
    assert found["kept"] == {"what": "the release", "where": str(release)}
    assert found["report"]["gates"][0]["passed"] is False

    assert main([*words, "--dry-run", "--gate", "gani > 1"]) == 2
    found = json.loads(capfd.readouterr().out)
    assert found["problems"][0]["message"] == found["message"]

    (release / "config.json").write_text("{}")
    assert main(["verify", str(release), "--json"]) == 27
    found = json.loads(capfd.readouterr().out)
    assert len(found["differences"]) == 1
    assert (found["status"], found["kept"]) == (27, None)


def test_env_says_what_a_bug_report_needs_and_nothing_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "secret-folder"))
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["versions"]["sage-hub"]
    assert found["cpu"]["cores"] >= 1
    assert found["memory"] > 1e9
    assert found["disk_free"]["current folder"] > 0
    assert {"HF_ENDPOINT", "HF_HOME"} <= set(found["set"])
    assert found["token"] == "in the environment"
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for secret in ("hf_writer", "secret-folder", "127.0.0.1", platform.node(), str(Path.home())):
        assert secret not in text + json.dumps(found), secret
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME"):
        monkeypatch.delenv(name)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token"] is None
    assert "HF_ENDPOINT" not in found["set"]


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", [limit])
    whole = machine.machine_memory()
    assert whole is not None
    limit.write_text("max\n")
    assert machine.machine_memory() == whole
    limit.write_text("1000000\n")
    assert machine.machine_memory() == 1_000_000


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh", "powershell"])
def test_completion_scripts_know_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert "sanitize" in script
    assert "stats-cache" in script


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        line = (
            f"source {script}; COMP_WORDS=(sage-hub {' '.join(words)}); COMP_CWORD={len(words)}; "
            "_shtab_sage_hub; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("sani") == ["sanitize"]
    assert complete("push", "a", "b", "--str") == ["--strength"]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_says_so_and_goes_on(
    number: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, output = tmp_path / "pair", tmp_path / "out"
    make_pair(pair, max_shard_size="8KB")
    words = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", str(output)]
    words += ["--retain", str(pair / "retain.jsonl"), "--json"]
    keep, kept = Work.keep, []

    def interrupted(self: Work, shard: str, record: dict[str, Any]) -> None:
        keep(self, shard, record)
        kept.append(shard)
        if len(kept) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(Work, "keep", interrupted)
    assert main(words) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        "sage-hub: error: Interrupted; the same command goes on where this one stopped."
    )
    where = {"what": "finished parts", "where": str(work_folder(output))}
    assert (json.loads(out)["status"], json.loads(out)["kept"]) == (130, where)
    assert f"What is finished is kept in {work_folder(output)}" in err
    assert not output.exists()
    assert main(words) == 0
    assert "2 of " in capsys.readouterr().err
    assert len(kept) == len(set(kept)) > 4
    assert verify(str(output)).differences == ()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_audit_promises_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "audit", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["audit", "a", "b"]) == 130
    assert capsys.readouterr().err == "sage-hub: error: Interrupted.\n"


def test_too_little_memory_is_a_problem_of_the_plan(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["push", str(pair / "base"), str(pair / "unlearned"), *proxies(pair), "--dry-run"]
    assert main([*words, "--json", "--memory", "0.6"]) == 26
    out, err = capsys.readouterr()
    assert [problem["status"] for problem in json.loads(out)["problems"]] == [26]
    assert "--memory allows 600 MB" in err

    monkeypatch.setattr(jobs, "machine_memory", lambda: 500_000_000)
    assert main(words) == 26
    assert "this machine has 500 MB" in capsys.readouterr().err
    monkeypatch.setattr(jobs, "machine_memory", lambda: 4_000_000_000)
    assert main(words) == 0
    assert "--memory allows 8 GB, and this machine has 4 GB" in capsys.readouterr().err
    monkeypatch.setattr(jobs, "machine_memory", lambda: None)  # not known
    assert main(words) == 0
    assert "this machine has" not in capsys.readouterr().err


def test_a_copy_of_card_and_record(
    on_hub: LoopbackHub, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "some" / "record"
    words = [*proxies(pair), "--record", str(record), "--quiet"]
    for more in ([], ["--low-disk"]):
        assert main(["push", "org/base", "org/unlearned", *words, *more]) == 0
        published = on_hub.files("org/unlearned-sage")
        left = {p.relative_to(record).as_posix() for p in record.rglob("*") if p.is_file()}
        assert left == {
            name
            for name in published
            if name in ("README.md", "SHA256SUMS") or name.startswith("sage/")
        }
        for name in left:
            assert (record / name).read_bytes() == published[name]
    (record / "README.md").unlink()
    assert main(["push", "org/base", "org/unlearned", *words, "--low-disk"]) == 0  # as it is there
    assert len(on_hub.commits("org/unlearned-sage")) == 3
    assert (record / "README.md").read_bytes() == published["README.md"]
    capsys.readouterr()
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(tmp_path / "out")]
    assert main(["sanitize", *both, *words]) == 0
    (record / "README.md").unlink()
    assert main(["sanitize", *both, *words]) == 0  # found finished, and left all the same
    assert (record / "README.md").exists()


def test_a_set_that_is_not_there_is_not_called_not_given(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(pair / "base"), str(pair / "unlearned"), "--retain", "no.jsonl"]
    assert main([*words, "--dry-run"]) == 10
    err = capsys.readouterr().err
    assert "  retain      cannot be used; see the problem below" in err
    assert "  forget      not given" in err
