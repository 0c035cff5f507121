"""What a person may type: commands, options, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sage_hub import __version__


def _gain(text: str) -> float | str:
    return text if text == "match" else float(text)


_gain.__name__ = "number or 'match'"  # argparse shows it in "invalid ... value"

METHOD = ("strength", "energy", "rank", "gain", "moments")  # what evaluation does not ask for
PROXY_HELP = (
    "A proxy is a .jsonl, .json, .csv, .parquet or .txt file, or "
    "hf://datasets/org/name[@revision][/file][?config=NAME&split=NAME], with the columns "
    "question/answer, prompt/completion, question/choices/answer, messages or text."
)
EPILOG = {
    "push": """examples:
  sage-hub push org/base org/unlearned
  sage-hub push org/base org/unlearned --retain retain.jsonl --forget forget.jsonl \\
      --heldout heldout.jsonl --gain match --create-pr
  sage-hub push ./base ./unlearned --to ./unlearned-sage --dry-run""",
    "sanitize": """example:
  sage-hub sanitize org/base@v1 ./unlearned --output ./release --retain retain.jsonl""",
    "plan": """examples:
  sage-hub plan org/base
  sage-hub plan org/base org/unlearned --memory 14 --max-tokens 50000""",
    "stats": """example:
  sage-hub stats org/base --retain retain.jsonl --output base.safetensors
  sage-hub push org/base org/unlearned --stats base.safetensors
  sage-hub stats org/base --retain retain.jsonl --to org/base-sage-stats
  sage-hub push org/base org/unlearned --stats org/base-sage-stats""",
    "audit": """example:
  sage-hub audit org/base org/unlearned --retain retain.jsonl --strength 10""",
    "eval": """examples:
  sage-hub eval org/base org/unlearned --forget forget.jsonl --heldout heldout.jsonl
  sage-hub eval ./base ./unlearned ./release --forget forget.jsonl --heldout heldout.jsonl \\
      --reference org/retain-only --bystander world_facts=facts.jsonl --robustness""",
    "card": """examples:
  sage-hub card ./release
  sage-hub card ./release --card-template short""",
    "verify": """examples:
  sage-hub verify ./release
  sage-hub verify org/unlearned-sage
  sage-hub verify org/unlearned-sage --rebuild""",
    "demo": """examples:
  sage-hub demo
  sage-hub demo --model smollm2 --output ./smollm2-demo""",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` is the name of the chosen command."""
    parser = argparse.ArgumentParser(
        prog="sage-hub",
        description="Repair an unlearned language model from its two checkpoints, and publish it.",
        epilog="Exit statuses: see the README. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"sage-hub {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=what if name in ("demo", "verify", "card") else f"{what} {PROXY_HELP}",
            epilog=EPILOG[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    push = add("push", "Sanitize the update from BASE to UNLEARNED and publish it.")
    _add_sources(push)
    push.add_argument(
        "--to",
        metavar="TARGET",
        help="Hub repo or folder (default: UNLEARNED with -sage)",
    )
    _add_publication(push)
    sanitize = add("sanitize", "The same as push, into a local folder.")
    _add_sources(sanitize)
    sanitize.add_argument("--output", type=Path, required=True, metavar="DIR")
    for command in (push, sanitize):
        _add_release_options(command)
        _add_settings(command, "retain", "forget", "heldout")
        _add_evaluation(command)
        _add_record(command)

    plan = add("plan", "Show what a run takes, without running it; from headers alone.")
    plan.add_argument("base", metavar="BASE", help="repo[@revision] or folder, or a config alone")
    plan.add_argument("unlearned", metavar="UNLEARNED", nargs="?", help="the same, if there is one")
    plan.add_argument("--to", metavar="TARGET", help="Hub repo or folder")
    plan.add_argument("--stats", metavar="FILE|REPO", help="ready statistics of BASE")
    plan.add_argument("--verbose", "-v", action="store_true", help="tensor by tensor")
    _add_settings(plan, "retain", "forget", "heldout")

    stats = add("stats", "Calibrate MODEL once and keep the statistics for --stats.")
    stats.add_argument("model", metavar="MODEL", help="Hub repo[@revision] or folder")
    where = stats.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, metavar="FILE", help="write them into this file")
    where.add_argument("--to", metavar="REPO", help="publish them to this repo of the Hub")
    _add_publication(stats)
    stats.add_argument(
        "--force", action="store_true", help="replace a repo that holds something else"
    )
    _add_stats_cache(stats)
    _add_settings(stats, "retain", "forget", skip=("strength", "gain", "parameters"))

    audit = add("audit", "Show how much the update disturbs what should be kept.")
    _add_sources(audit)
    audit.add_argument(
        "--top", type=int, default=15, metavar="N", help="modules to show (default: 15)"
    )
    audit.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with pictures into this file too"
    )
    _add_settings(audit, "retain", "forget", skip=("gain",))

    evaluate = add("eval", "Evaluate models on the same rows and compare them with the first.")
    evaluate.add_argument(
        "models", metavar="MODEL", nargs="+", help="Hub repo[@revision] or folder"
    )
    _add_settings(evaluate, "retain", "forget", "heldout", skip=(*METHOD, "parameters"))
    _add_evaluation(evaluate)

    card = add("card", "Write the card of a release in a folder again, from its record.")
    card.add_argument("release", metavar="DIR", type=Path)
    _add_card_template(card)
    _add_output_options(card)

    verify = add("verify", "Compare every file of RELEASE with its manifest.")
    verify.add_argument("release", metavar="RELEASE", help="Hub repo[@revision] or folder")
    verify.add_argument(
        "--rebuild",
        action="store_true",
        help="make it again from the recorded commits and settings, and compare; local files are "
        "looked for in the current folder",
    )
    _add_output_options(verify)

    demo = add("demo", "Make a small unlearning problem and run the main job on it.")
    demo.add_argument("--output", type=Path, default=Path("sage-demo"), metavar="DIR")
    demo.add_argument("--model", choices=("people", "smollm2"), default="people")
    demo.add_argument("--method", choices=("npo", "ga"), default="npo", help="how to unlearn")
    demo.add_argument("--force", action="store_true", help="replace what is in the folder")
    _add_settings(demo)
    demo.set_defaults(seed=0)
    return parser


def _add_publication(command: argparse.ArgumentParser) -> None:
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


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "base", metavar="BASE", help="before unlearning: repo[@revision] or folder"
    )
    command.add_argument("unlearned", metavar="UNLEARNED", help="after unlearning: the same")
    command.add_argument(
        "--stats",
        metavar="FILE|REPO",
        help="ready statistics of BASE, from sage-hub stats: a file or Hub repo[@revision]",
    )
    _add_stats_cache(command)


def _add_release_options(command: argparse.ArgumentParser) -> None:
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
        help="keep a shard of each side at a time; evaluates nothing",
    )
    command.add_argument(
        "--merge",
        action="store_true",
        default=argparse.SUPPRESS,
        help="where UNLEARNED is an adapter: write the whole model, not an adapter",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="show the plan and its problems, and stop"
    )
    command.add_argument(
        "--verbose", "-v", action="store_true", help="list the plan tensor by tensor"
    )
    command.add_argument("--yes", "-y", action="store_true", help="don't ask before publishing")


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    """Options of the commands that evaluate models."""
    absent: Any = argparse.SUPPRESS
    command.add_argument(
        "--unseen",
        metavar="PROXY",
        default=absent,
        help="what no model was trained on, for PrivLeak",
    )
    command.add_argument(
        "--bystander",
        dest="bystanders",
        metavar="NAME=PROXY",
        action=_Named,
        default=absent,
        help="one more set to evaluate on; again for more",
    )
    command.add_argument(
        "--reference",
        metavar="MODEL",
        default=absent,
        help="a model that never saw the forget set, for forget quality and PrivLeak",
    )
    command.add_argument(
        "--suite",
        choices=("auto", "tofu", "muse", "choice", "text"),
        default=absent,
        help="which metrics (default: auto, by the columns of each set)",
    )
    command.add_argument(
        "--generate-rows",
        type=int,
        metavar="N",
        default=absent,
        help="rows of each set whose answers are generated, for ROUGE; 0: none (default: 100)",
    )
    command.add_argument(
        "--robustness",
        action="store_true",
        default=absent,
        help="evaluate after int8 and int4 rounding, after relearning, and on other wordings",
    )
    command.add_argument(
        "--lm-eval", metavar="TASKS", default=absent, help="run these tasks of lm-eval too: a,b"
    )


def _add_record(command: argparse.ArgumentParser) -> None:
    """Options of what is said of a release."""
    absent: Any = argparse.SUPPRESS
    command.add_argument(
        "--gate",
        dest="gates",
        metavar="CONDITION",
        action="append",
        default=absent,
        help="stop unless it is met, as 'heldout.probability >= base - 0.02'; again for more",
    )
    command.add_argument(
        "--results",
        metavar="MODEL=PATH",
        action=_Named,
        default=absent,
        help="results of open-unlearning or lm-eval for base, unlearned or sanitized",
    )
    _add_card_template(command)


def _add_card_template(command: argparse.ArgumentParser) -> None:
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
            parser.error(f"argument {option}: expected {self.metavar}, not {values!r}")
        gathered = dict(getattr(namespace, self.dest, {}))
        setattr(namespace, self.dest, gathered | {name: value})


def _add_stats_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--stats-cache",
        type=Path,
        metavar="DIR",
        help="take statistics from this folder if they are there, else leave them there",
    )


def _add_settings(command: argparse.ArgumentParser, *sets: str, skip: Sequence[str] = ()) -> None:
    """Options of `sage_hub.settings.Settings`; absent ones stay absent, so sage.yaml can speak."""
    absent = argparse.SUPPRESS
    if sets:
        command.add_argument(
            "--config", metavar="FILE", help="settings file (default: sage.yaml, see the README)"
        )
    helps = {
        "retain": "what must be kept (default: a general-purpose proxy)",
        "forget": "what must go",
        "heldout": "retained knowledge outside the proxy, to evaluate on",
    }
    for name in sets:
        command.add_argument(f"--{name}", metavar="PROXY", default=absent, help=helps[name])

    def add(name: str, kind: Callable[[str], Any], metavar: str, what: str) -> None:
        if name not in skip:
            command.add_argument(
                f"--{name.replace('_', '-')}",
                type=kind,
                metavar=metavar,
                default=absent,
                help=what,
            )

    add("strength", float, "λ", "how strongly retained directions are protected (default: 1)")
    add("energy", float, "ρ", "share of the retain energy that is protected (default: 0.9)")
    add("rank", int, "K", "protect at most K directions per site")
    add("gain", _gain, "γ", "turn up what remains: a number or 'match' (default: 1)")
    add("max_tokens", int, "N", "tokens of each proxy to calibrate on (default: 131072)")
    add("max_length", int, "N", "longest row in tokens (default: 2048)")
    add("batch_size", int, "N", "rows at a time (default: 8)")
    add("device", str, "DEVICE", "cpu, cuda, mps (default: cuda if there is one)")
    add("seed", int, "N", "for the choice of rows (default: 0)")
    add("memory", float, "GB", "what calibration and evaluation may take (default: 8)")
    if "moments" not in skip:
        command.add_argument(
            "--moments",
            choices=("auto", "exact", "sketch"),
            default=absent,
            help="second moments exact or sketched; auto: exact where --memory allows "
            "(default: auto)",
        )
    if "parameters" not in skip:
        command.add_argument(
            "--parameters",
            choices=("linear", "all"),
            default=absent,
            help="what is filtered: linear layers, or embedding, LM head, norms and biases too "
            "(default: linear)",
        )
    command.add_argument(
        "--no-chat-template",
        dest="chat_template",
        action="store_false",
        default=absent,
        help="use the rows' plain form even if the tokenizer has a chat template",
    )
    _add_output_options(command)


def _add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    command.add_argument("--quiet", "-q", action="store_true", help="no plan, notes or bars")
