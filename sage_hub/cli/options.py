"""The options of the commands: those that are no settings, declared here, and the settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sage_hub.commands.benchmarks import BENCHMARKS
from sage_hub.kinds import PROXY, SWITCH, Kind, Setting, whole
from sage_hub.settings import SETTINGS

# The commands that have it, its names, and how argparse takes it.
Option = tuple[Sequence[str], Sequence[str], Mapping[str, Any]]


def add_options(command: argparse.ArgumentParser, name: str) -> None:
    """Give `command`, which is called `name`, all its options and arguments."""
    for title, own in OPTIONS.items():
        settings = [_of(setting) for setting in SETTINGS.values() if setting.group == title]
        options = [option for option in (*own, *settings) if name in option[0]]
        place: argparse._ActionsContainer = command
        if options and title == ONE_OF:
            place = command.add_mutually_exclusive_group(required=True)
        elif options and title:
            place = command.add_argument_group(title)
        for _, names, how in options:
            place.add_argument(*names, **how)


def _of(setting: Setting) -> Option:
    """A setting as an option; an absent one stays absent, so that sage.yaml can speak."""
    how: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": setting.help}
    if setting.name == "chat_template":  # in three states, of two settings
        how |= {"action": _NoTemplate, "nargs": 0, "help": f"don't {setting.help}"}
    elif setting.name == "template":
        said = "; without NAME that which it has, also where sage.yaml says chat_template: false"
        how |= {"action": _Template, "nargs": "?", "metavar": setting.kind.metavar}
        how["help"] = f"{setting.help} (default: {setting.default_words}){said}"
    elif setting.kind is SWITCH:  # what sage.yaml turns on can be turned off with --no-…
        how["action"] = argparse.BooleanOptionalAction
    else:
        how |= _taken(setting.kind)
        how["help"] += "; again for more" if how.get("action") in ("append", _Named) else ""
        how["help"] += f" (default: {setting.default_words})" if setting.default_words else ""
    return setting.commands, (setting.option,), how


def _taken(kind: Kind) -> dict[str, Any]:
    """How argparse takes the values of a setting, switches aside."""
    if "enum" in kind.schema:
        return {"choices": kind.schema["enum"]}
    how: dict[str, Any] = {"metavar": kind.metavar}
    if kind.convert is not str:
        return how | {"type": _reader(kind)}
    actions = {"string": _Once if kind is PROXY else "store", "array": "append", "object": _Named}
    return how | {"action": actions[kind.schema["type"]]}


def _reader(kind: Kind) -> Callable[[str], Any]:
    """What makes a value of this kind of a word of the command line."""

    def read(text: str) -> Any:
        with suppress(ValueError):
            value = text if kind.fits(text) else kind.convert(text)
            if kind.fits(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {kind.wanted}, not {text!r}")

    return read


class _Named(argparse.Action):
    """Options NAME=VALUE, gathered in a dict."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        name, _, value = values.partition("=")
        if not (name and value):
            raise argparse.ArgumentError(self, f"must be {self.metavar}, not {values!r}")
        gathered = dict(getattr(namespace, self.dest, {}))
        setattr(namespace, self.dest, gathered | {name: value})


class _Once(argparse.Action):
    """An option that means one thing, so that a second value is a mistake."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "must be given once; put all rows into one file")
        setattr(namespace, self.dest, values)


class _Template(argparse.Action):
    """`--chat-template [NAME]`: rows go into a chat template, whatever sage.yaml says."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values is not None:
            if "/" in values:  # what stands behind an option that may have a value, or none
                wrong = f"takes the name of a template; put {values} before it"
                raise argparse.ArgumentError(self, wrong)
            namespace.template = values
        namespace.chat_template = True


class _NoTemplate(argparse.Action):
    """`--no-chat-template`: rows are plain, whatever template or system prompt sage.yaml names."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.chat_template = False
        for name in ("template", "system_prompt"):
            setattr(namespace, name, getattr(namespace, name, None))


def _option(commands: str, names: str, metavar: str, help: str, **how: Any) -> Option:
    """One that is no setting; without a metavar or choices it is a switch."""
    if metavar:
        how["metavar"] = metavar
    elif "choices" not in how:
        how["action"] = "store_true"
    if metavar in ("DIR", "FILE"):  # shells leave the tilde of `--output=~/release` as it is
        how["type"] = lambda text: Path(text).expanduser()
    return commands.split(), names.split(), {**how, "help": help}


ALL = "push sanitize plan init data stats audit eval card verify review demo env"
SOURCE = "Hub repo[@revision] or folder"
ONE_OF = "one of"
# By the group that shows them in the help, in its order; "" is argparse's own.
OPTIONS: Mapping[str, Sequence[Option]] = {
    "": (
        _option("push sanitize audit init", "base", "BASE", f"before unlearning: {SOURCE}"),
        _option("plan", "base", "BASE", f"{SOURCE}, or a config alone"),
        _option("push sanitize audit init", "unlearned", "UNLEARNED", "after unlearning: the same"),
        _option("plan", "unlearned", "UNLEARNED", "the same, if there is one", nargs="?"),
        _option("stats", "model", "MODEL", SOURCE),
        _option("eval", "models", "MODEL", SOURCE, nargs="+"),
        _option("data", "proxies", "PROXY", "rows that are in no set yet", nargs="*"),
        _option("card", "release", "DIR", "the folder of the release"),
        _option("verify review", "release", "RELEASE", SOURCE),
        _option("plan", "--to", "TARGET", "Hub repo or folder"),
        _option(
            *("push sanitize plan audit", "--stats", "FILE|REPO"),
            "ready statistics of BASE, from sage-hub stats: a file or Hub repo[@revision]",
        ),
        _option(
            *("push sanitize stats audit", "--stats-cache", "DIR"),
            "take statistics from this folder if they are there, else leave them there",
        ),
        _option(
            *("audit", "--top", "N", "modules to show (default: 15)"),
            type=_reader(whole(0)),
            default=15,
        ),
        _option(
            *("data", "--rows", "N", "rows of each set to show (default: 3)"),
            type=_reader(whole(0)),
            default=3,
        ),
        _option("audit", "--html", "FILE", "write a page with pictures into this file too"),
        _option(
            *("review", "--answers", "FILE"),
            "answers that `sage-hub eval --answers` has left (default: those that the run left "
            "beside the release)",
        ),
        _option(
            *("review", "--output", "FILE"),
            "write the page into this file (default: beside the release, or here)",
        ),
        _option("review", "--no-open", "", "don't open it in a browser"),
        _option(
            *("verify", "--rebuild", ""),
            "make it again from the recorded commits and settings, and compare; local files are "
            "looked for in the current folder",
        ),
        _option(
            *("demo", "--output", "DIR", "write everything into this folder (default: sage-demo)"),
            default=Path("sage-demo"),
        ),
        _option(
            *("demo", "--model", ""),
            "made-up people in a model trained here, or SmolLM2-135M (default: people)",
            choices=("people", "smollm2"),
            default="people",
        ),
        _option(
            *("demo", "--method", "", "how to unlearn (default: npo)"),
            choices=("npo", "ga"),
            default="npo",
        ),
        _option("demo", "--force", "", "replace what is in the folder"),
        _option(
            *("init", "--output", "FILE", "write the settings here (default: sage.yaml)"),
            default=Path("sage.yaml"),
        ),
        _option("init", "--force", "", "replace the file that is there"),
    ),
    ONE_OF: (
        _option("stats", "--output", "FILE", "write them into this file, or folder"),
        _option("stats", "--to", "REPO", "publish them to this repo of the Hub"),
    ),
    "data": (
        _option(
            *("push sanitize plan data stats audit eval", "--config", "FILE"),
            "settings (default: sage.yaml, see docs/settings.md)",
        ),
        _option(
            *("push sanitize plan data audit eval", "--benchmark", "NAME"),
            "the sets and settings that it prescribes, beneath those of sage.yaml: "
            f"{', '.join(BENCHMARKS)}",
        ),
        _option("plan", "--show", "", "print the settings of --benchmark, and stop"),
        _option(
            *("stats", "--retain", "PROXY"),
            "what must be kept (default: a general-purpose proxy); given several times, --output "
            "is a folder, and each gets a file there, from one pass over the weights",
            action="append",
            default=argparse.SUPPRESS,
        ),
        _option(
            *("push sanitize", "--save-retain", "FILE"),
            "leave the retain rows that the base writes in this file; they may hold what was to "
            "be forgotten, and are never published",
        ),
        _option(
            *("eval", "--answers", "FILE"),
            "leave what each model made of each row in this file, for `sage-hub review`; it may "
            "hold what was to be forgotten",
        ),
    ),
    "publication": (
        _option("push", "--to", "TARGET", "Hub repo or folder (default: UNLEARNED with -sage)"),
        _option("push stats", "--private", "", "create the target repo private"),
        _option(
            *("push stats", "--create-pr", ""),
            "propose it in a pull request, or go on with the open one of the same title",
        ),
        _option(
            *("push", "--announce", ""),
            "propose, in a pull request on UNLEARNED, that its card names the release as its new "
            "version",
        ),
        _option("push stats", "--branch", "NAME", "commit to this branch, made if absent"),
        _option("push stats", "--tag", "NAME", "tag the commit"),
        _option("push stats", "--commit-message", "TEXT", "its first line titles the PR"),
        _option(
            *("push stats", "--token", "TOKEN"),
            "to write the target with; better SAGE_HUB_WRITE_TOKEN in the environment (default: "
            "the token that reads, see `hf auth`)",
        ),
        _option("stats", "--force", "", "replace a repo that holds something else"),
    ),
    "release": (
        _option("sanitize", "--output", "DIR", "write it into this folder", required=True),
        _option("push sanitize", "--force", "", "replace a target that sage-hub did not make"),
        _option(
            *("push sanitize", "--record", "DIR"),
            "leave a copy of the card and the record (sage/) in this folder too",
        ),
        _option(
            *("push sanitize card", "--sign", "COMMAND"),
            "sign SHA256SUMS with this command, which gets that name behind its words and leaves "
            "SHA256SUMS.asc or the like beside it: 'gpg --armor --detach-sign'",
        ),
    ),
    **dict.fromkeys(("evaluation", "record", "method", "computation"), ()),  # settings alone
    "this run": (
        _option("push sanitize", "--dry-run", "", "show the plan and its problems, and stop"),
        _option("push sanitize plan", "--verbose -v", "", "list the plan by tensor"),
        _option("push sanitize", "--yes -y", "", "don't ask before publishing"),
        _option(ALL, "--json", "", "print one JSON object on stdout"),
        _option(ALL, "--quiet -q", "", "no plan, notes or bars"),
    ),
}
