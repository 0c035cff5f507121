"""The options that several commands share, with their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def local_path(text: str) -> Path:
    """A path as shells have it: `--output=~/release` reaches us with its tilde."""
    return Path(text).expanduser()


def add_publication(command: argparse._ActionsContainer) -> None:
    """How it goes to a repo of the Hub."""
    command.add_argument("--private", action="store_true", help="create the target repo private")
    command.add_argument(
        "--create-pr",
        action="store_true",
        help="propose it in a pull request, or go on with the open one of the same title",
    )
    command.add_argument("--branch", metavar="NAME", help="commit to this branch, made if absent")
    command.add_argument("--tag", metavar="NAME", help="tag the commit")
    command.add_argument("--commit-message", metavar="TEXT", help="its first line titles the PR")
    command.add_argument(
        "--token",
        metavar="TOKEN",
        help="to write the target with; better SAGE_HUB_WRITE_TOKEN in the environment (default: "
        "the token that reads, see `hf auth`)",
    )


def add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "base", metavar="BASE", help="before unlearning: repo[@revision] or folder"
    )
    command.add_argument("unlearned", metavar="UNLEARNED", help="after unlearning: the same")
    command.add_argument(
        "--stats",
        metavar="FILE|REPO",
        help="ready statistics of BASE, from sage-hub stats: a file or Hub repo[@revision]",
    )
    add_stats_cache(command)


def add_release_options(command: argparse._ActionsContainer) -> None:
    """Options of the commands that make a release."""
    command.add_argument(
        "--force", action="store_true", help="replace a target that sage-hub did not make"
    )
    command.add_argument(
        "--out-dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        default=argparse.SUPPRESS,
        help="store the release in this type (default: as the unlearned side does)",
    )
    command.add_argument(
        "--low-disk",
        action="store_true",
        default=argparse.SUPPRESS,
        help="keep a shard of each source at a time, and of the result what is evaluated",
    )
    command.add_argument(
        "--merge",
        action="store_true",
        default=argparse.SUPPRESS,
        help="where UNLEARNED is an adapter: write the whole model, not an adapter",
    )
    command.add_argument(
        "--record",
        type=local_path,
        metavar="DIR",
        help="leave a copy of the card and the record (sage/) in this folder too",
    )


def add_run_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("this run")
    group.add_argument(
        "--dry-run", action="store_true", help="show the plan and its problems, and stop"
    )
    group.add_argument("--verbose", "-v", action="store_true", help="list the plan by tensor")
    group.add_argument("--yes", "-y", action="store_true", help="don't ask before publishing")
    add_output_options(group)


def add_evaluation(command: argparse.ArgumentParser) -> None:
    """Options of the commands that evaluate models."""
    absent: Any = argparse.SUPPRESS
    group = command.add_argument_group("evaluation")
    group.add_argument(
        "--unseen",
        metavar="PROXY",
        default=absent,
        help="what no model was trained on, for PrivLeak",
    )
    group.add_argument(
        "--bystander",
        dest="bystanders",
        metavar="NAME=PROXY",
        action=_Named,
        default=absent,
        help="one more set to evaluate on; again for more",
    )
    group.add_argument(
        "--reference",
        metavar="MODEL",
        default=absent,
        help="a model that never saw the forget set, for forget quality and PrivLeak",
    )
    group.add_argument(
        "--suite",
        choices=("auto", "tofu", "muse", "choice", "text"),
        default=absent,
        help="which metrics (default: auto, by the columns of each set)",
    )
    group.add_argument(
        "--generate-rows",
        type=whole,
        metavar="N",
        default=absent,
        help="rows of each set whose answers are generated, for ROUGE; 0: none (default: 100)",
    )
    group.add_argument(
        "--robustness",
        action="store_true",
        default=absent,
        help="evaluate after int8 and int4 rounding, after relearning, and on other wordings",
    )
    group.add_argument(
        "--lm-eval", metavar="TASKS", default=absent, help="run these tasks of lm-eval too: a,b"
    )


def add_record(command: argparse.ArgumentParser) -> None:
    """Options of what is said of a release."""
    absent: Any = argparse.SUPPRESS
    group = command.add_argument_group("the record")
    group.add_argument(
        "--gate",
        dest="gates",
        metavar="CONDITION",
        action="append",
        default=absent,
        help="stop unless it is met, as 'heldout.probability >= base - 0.02'; again for more",
    )
    group.add_argument(
        "--results",
        metavar="MODEL=PATH",
        action=_Named,
        default=absent,
        help="results of open-unlearning or lm-eval for base, unlearned or sanitized",
    )
    add_card_template(group)


def add_card_template(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--card-template",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a Jinja template for the card, or 'short'",
    )


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


def add_stats_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--stats-cache",
        type=local_path,
        metavar="DIR",
        help="take statistics from this folder if they are there, else leave them there",
    )


def add_data(command: argparse.ArgumentParser, *sets: str) -> argparse._ArgumentGroup:
    group = command.add_argument_group("data")
    group.add_argument(
        "--config", metavar="FILE", help="settings file (default: sage.yaml, see the README)"
    )
    helps = {
        "retain": "what must be kept (default: a general-purpose proxy)",
        "forget": "what must go",
        "heldout": "retained knowledge outside the proxy, to evaluate on",
    }
    for name in sets:
        group.add_argument(
            f"--{name}",
            metavar="PROXY",
            action=_Once,
            default=argparse.SUPPRESS,
            help=helps[name],
        )
    return group


def add_settings(command: argparse.ArgumentParser, *, skip: Sequence[str] = ()) -> None:
    """Options of `sage_hub.settings.Settings`; absent ones stay absent, so sage.yaml can speak."""
    absent = argparse.SUPPRESS
    group = command.add_argument_group("settings")

    def add(name: str, kind: Callable[[str], Any], metavar: str, what: str) -> None:
        if name not in skip:
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=kind,
                metavar=metavar,
                default=absent,
                help=what,
            )

    add(
        "strength",
        _number,
        "λ",
        "how strongly retained directions are protected (default: 100; 10 without a search)",
    )
    add(
        "energy",
        _number,
        "ρ",
        "share of the retain energy that is protected (default: 0.99; 0.9 without)",
    )
    add("rank", whole, "K", "protect at most K directions per site")
    add("gain", _gain, "γ", "turn up what remains: a number, 'match' or 'auto' (default: auto)")
    if "gain" not in skip:
        add("target", _number, "LEVEL", "of the forget set, for 'auto' (default: the source's)")
    add("max_tokens", whole, "N", "tokens of each proxy to calibrate on (default: 131072)")
    add("max_length", whole, "N", "longest row in tokens (default: 2048)")
    add("batch_size", whole, "N", "rows at a time (default: 8)")
    add("device", str, "DEVICE", "cpu, cuda, mps (default: cuda if there is one)")
    add("seed", whole, "N", "for the choice of rows (default: 0)")
    add("memory", _number, "GB", "what calibration and evaluation may take (default: 8)")
    if "moments" not in skip:
        group.add_argument(
            "--moments",
            choices=("auto", "exact", "sketch"),
            default=absent,
            help="second moments exact or sketched; auto: exact where --memory allows "
            "(default: auto)",
        )
    if "parameters" not in skip:
        group.add_argument(
            "--parameters",
            choices=("linear", "all"),
            default=absent,
            help="what is filtered: linear layers, or embedding, LM head, norms and biases too "
            "(default: linear)",
        )
    group.add_argument(
        "--no-chat-template",
        dest="chat_template",
        action="store_false",
        default=absent,
        help="use the rows' plain form even if the tokenizer has a chat template",
    )


def add_output_options(command: argparse._ActionsContainer) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    command.add_argument("--quiet", "-q", action="store_true", help="no plan, notes or bars")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _gain(text: str) -> float | str:
    if text in ("match", "auto"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number, 'match' or 'auto', not {text!r}"
        ) from None


class _Once(argparse.Action):
    """An option that means one thing, so that a second value is a mistake."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "must be given once; put all rows into one file")
        setattr(namespace, self.dest, values)
