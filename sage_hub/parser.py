"""What a person may type: commands with their options, and what is said of a mistyped one."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sage_hub import __version__
from sage_hub.errors import UsageError
from sage_hub.options import (
    add_card_template,
    add_data,
    add_evaluation,
    add_output_options,
    add_publication,
    add_record,
    add_release_options,
    add_run_options,
    add_settings,
    add_sources,
    add_stats_cache,
    local_path,
    whole,
)

METHOD = ("strength", "energy", "rank", "gain", "moments", "parameters")  # not for evaluation
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
PROXY_HELP = (
    "A PROXY is a .jsonl, .json, .csv, .parquet or .txt file, or "
    "hf://datasets/org/name[@revision][/file][?config=NAME&split=NAME], with the columns "
    "question/answer, prompt/completion, question/choices/answer, messages or text."
)
EXAMPLES = {
    "": """examples:
  sage-hub demo
  sage-hub push org/base org/unlearned --retain retain.jsonl --dry-run
  sage-hub push org/base org/unlearned --retain retain.jsonl
  sage-hub verify org/unlearned-sage

Each command has its own --help. Exit statuses: 0 is done, 1 an internal error,
2 a wrong option or setting, 130 interrupted; the README has all others.""",
    "push": """examples:
  sage-hub push org/base org/unlearned
  sage-hub push org/base org/unlearned --retain retain.jsonl \\
      --forget forget.jsonl --heldout heldout.jsonl --gain auto --create-pr
  sage-hub push ./base ./unlearned --to ./unlearned-sage --dry-run""",
    "sanitize": """example:
  sage-hub sanitize org/base@v1 ./unlearned --output ./release \\
      --retain retain.jsonl""",
    "plan": """examples:
  sage-hub plan org/base
  sage-hub plan org/base org/unlearned --memory 14 --max-tokens 50000""",
    "stats": """examples:
  sage-hub stats org/base --retain retain.jsonl --forget forget.jsonl \\
      --output base.safetensors
  sage-hub push org/base org/unlearned --stats base.safetensors
  sage-hub stats org/base --retain one.jsonl --retain two.jsonl --output stats
  sage-hub stats org/base --retain retain.jsonl --to org/base-sage-stats
  sage-hub push org/base org/unlearned --stats org/base-sage-stats""",
    "audit": """example:
  sage-hub audit org/base org/unlearned --retain retain.jsonl --strength 10""",
    "eval": """examples:
  sage-hub eval org/base org/unlearned --forget forget.jsonl \\
      --heldout heldout.jsonl
  sage-hub eval ./base ./unlearned ./release --forget forget.jsonl \\
      --bystander world_facts=facts.jsonl --reference org/retain-only \\
      --robustness""",
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
    "env": """examples:
  sage-hub env
  sage-hub env --json""",
}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What `words` ask for; `command` is the name of the command.

    Raises UsageError for anything that is not understood, with the nearest thing that is.
    """
    words = sys.argv[1:] if words is None else words
    parser, commands = make_parser()
    _refuse_unknown(words, parser, commands)
    return parser.parse_args(words)


def _refuse_unknown(
    words: Sequence[str],
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
) -> None:
    """Before argparse looks, which names what is missing first and suggests nothing."""
    if words and not words[0].startswith("-"):
        if words[0] not in commands:
            raise UsageError(
                f"sage-hub has no command {words[0]!r}; {_nearest(words[0], commands, 'sage-hub')}"
            )
        parser, words = commands[words[0]], words[1:]
    known = [name for action in parser._actions for name in action.option_strings]
    likely = [name for name in known if name != "--help"]
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            raise UsageError(
                f"{parser.prog} has no option {name}; {_nearest(name, likely, parser.prog)}"
            )


def _nearest(word: str, known: Iterable[str], program: str) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"see `{program} --help`."


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, each as one sentence."""

    def error(self, message: str) -> NoReturn:
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{missing[1]} must be given"
        elif extra := re.fullmatch(r"unrecognized arguments: (.*)", message):
            message = f"not understood: {extra[1]}"
        else:
            message = re.sub(r"^argument (\S+): must", r"\1 must", message)
            message = re.sub(r"^argument (\S+):", r"\1:", message)
        raise UsageError(f"{message[0].upper()}{message[1:]}. See `{self.prog} --help`.")


class _PrintCompletion(argparse.Action):
    """`--print-completion SHELL`."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        import shtab

        print(shtab.complete(parser, shell=given[1]))
        parser.exit(0)


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and of each command."""
    parser = _Parser(
        prog="sage-hub",
        usage="sage-hub COMMAND ARGUMENTS [options]",
        description="Repair an unlearned language model from its two checkpoints, and publish it.",
        epilog=EXAMPLES[""],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sage-hub {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script that completes commands and options: {', '.join(SHELLS)}",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (usage, what, fill) in COMMANDS.items():
        takes_proxies = name in TAKE_PROXIES
        command = commands.add_parser(
            name,
            prog=f"sage-hub {name}",
            usage=f"sage-hub {name} {usage}",
            help=what,
            description=textwrap.fill(
                f"{what} {PROXY_HELP}" if takes_proxies else what, 79, break_on_hyphens=False
            ),
            epilog=EXAMPLES[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        fill(command)
    return parser, commands.choices


def _push(command: argparse.ArgumentParser) -> None:
    add_sources(command)
    add_data(command, "retain", "forget", "heldout")
    release = command.add_argument_group("the release")
    release.add_argument(
        "--to",
        metavar="TARGET",
        help="Hub repo or folder (default: UNLEARNED with -sage)",
    )
    add_publication(release)
    add_release_options(release)
    add_evaluation(command)
    add_record(command)
    add_settings(command)
    add_run_options(command)


def _sanitize(command: argparse.ArgumentParser) -> None:
    add_sources(command)
    add_data(command, "retain", "forget", "heldout")
    release = command.add_argument_group("the release")
    release.add_argument(
        "--output", type=local_path, required=True, metavar="DIR", help="write it into this folder"
    )
    add_release_options(release)
    add_evaluation(command)
    add_record(command)
    add_settings(command)
    add_run_options(command)


def _plan(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "base", metavar="BASE", help="repo[@revision] or folder, or a config alone"
    )
    command.add_argument(
        "unlearned", metavar="UNLEARNED", nargs="?", help="the same, if there is one"
    )
    command.add_argument("--to", metavar="TARGET", help="Hub repo or folder")
    command.add_argument("--stats", metavar="FILE|REPO", help="ready statistics of BASE")
    command.add_argument("--verbose", "-v", action="store_true", help="tensor by tensor")
    add_data(command, "retain", "forget", "heldout")
    add_settings(command)
    add_output_options(command)


def _stats(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="Hub repo[@revision] or folder")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--output", type=local_path, metavar="FILE", help="write them into this file, or folder"
    )
    where.add_argument("--to", metavar="REPO", help="publish them to this repo of the Hub")
    add_publication(command)
    command.add_argument(
        "--force", action="store_true", help="replace a repo that holds something else"
    )
    add_stats_cache(command)
    add_data(command, "forget").add_argument(
        "--retain",
        metavar="PROXY",
        action="append",
        default=argparse.SUPPRESS,
        help="what must be kept (default: a general-purpose proxy); given several times, --output "
        "is a folder, and each gets a file there, from one pass over the weights",
    )
    add_settings(command, skip=("strength", "gain", "parameters"))
    add_output_options(command)


def _audit(command: argparse.ArgumentParser) -> None:
    add_sources(command)
    command.add_argument(
        "--top", type=whole, default=15, metavar="N", help="modules to show (default: 15)"
    )
    command.add_argument(
        "--html",
        type=local_path,
        metavar="FILE",
        help="write a page with pictures into this file too",
    )
    add_data(command, "retain", "forget")
    add_settings(command, skip=("gain",))
    add_output_options(command)


def _eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", metavar="MODEL", nargs="+", help="repo[@revision] or folder")
    add_data(command, "retain", "forget", "heldout")
    add_evaluation(command)
    add_settings(command, skip=METHOD)
    add_output_options(command)


def _card(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "release", metavar="DIR", type=local_path, help="the folder of the release"
    )
    add_card_template(command)
    add_output_options(command)


def _verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("release", metavar="RELEASE", help="Hub repo[@revision] or folder")
    command.add_argument(
        "--rebuild",
        action="store_true",
        help="make it again from the recorded commits and settings, and compare; local files are "
        "looked for in the current folder",
    )
    add_output_options(command)


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output",
        type=local_path,
        default=Path("sage-demo"),
        metavar="DIR",
        help="write everything into this folder (default: sage-demo)",
    )
    command.add_argument(
        "--model",
        choices=("people", "smollm2"),
        default="people",
        help="made-up people in a model trained here, or SmolLM2-135M (default: people)",
    )
    command.add_argument(
        "--method", choices=("npo", "ga"), default="npo", help="how to unlearn (default: npo)"
    )
    command.add_argument("--force", action="store_true", help="replace what is in the folder")
    add_settings(command)
    add_output_options(command)
    command.set_defaults(seed=0)


def _env(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    command.set_defaults(quiet=False)


# Name: usage behind it, what it does, and what adds its options.
COMMANDS: Mapping[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "push": (
        "BASE UNLEARNED [--to TARGET] [options]",
        "Sanitize the update from BASE to UNLEARNED and publish it.",
        _push,
    ),
    "sanitize": (
        "BASE UNLEARNED --output DIR [options]",
        "The same as push, into a local folder.",
        _sanitize,
    ),
    "plan": (
        "BASE [UNLEARNED] [options]",
        "Show what a run takes, without running it; from headers alone.",
        _plan,
    ),
    "stats": (
        "MODEL (--output FILE | --to REPO) [options]",
        "Calibrate MODEL once and keep the statistics for --stats.",
        _stats,
    ),
    "audit": (
        "BASE UNLEARNED [options]",
        "Show how much the update disturbs what should be kept.",
        _audit,
    ),
    "eval": (
        "MODEL [MODEL …] [options]",
        "Evaluate models on the same rows and compare them with the first.",
        _eval,
    ),
    "card": (
        "DIR [options]",
        "Write the card of a release again, from its record.",
        _card,
    ),
    "verify": (
        "RELEASE [options]",
        "Compare every file of RELEASE with its manifest.",
        _verify,
    ),
    "demo": (
        "[options]",
        "Make a small unlearning problem and run the main job on it.",
        _demo,
    ),
    "env": (
        "[--json]",
        "Describe this machine for a bug report; no names, no secrets.",
        _env,
    ),
}
TAKE_PROXIES = frozenset({"push", "sanitize", "plan", "stats", "audit", "eval"})
