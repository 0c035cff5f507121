"""What a person may type: commands with their options, and what is said of a mistyped one."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from sage_hub import __version__
from sage_hub.cli.options import add_options
from sage_hub.errors import UsageError

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
PROXY_HELP = (
    "A PROXY is a .jsonl, .json, .csv, .parquet or .txt file, or "
    "hf://datasets/org/name[@revision][/file][?config=NAME&split=NAME], with the columns "
    "question/answer, prompt/completion, question/choices/answer, messages or text."
)
EXAMPLES = """examples:
  sage-hub demo
  sage-hub push org/base org/unlearned --retain retain.jsonl --dry-run
  sage-hub push org/base org/unlearned --retain retain.jsonl
  sage-hub verify org/unlearned-sage

Each command has its own --help. Exit statuses: 0 is done, 1 an internal error,
2 a wrong option or setting, 130 interrupted; the README has all others."""
# Of each command what is behind it, what it does, and examples.
COMMANDS = {
    "push": """BASE UNLEARNED [--to TARGET] [options]
Sanitize the update from BASE to UNLEARNED and publish it.
  sage-hub push org/base org/unlearned
  sage-hub push org/base org/unlearned --retain retain.jsonl \\
      --forget forget.jsonl --heldout heldout.jsonl --gain auto --create-pr
  sage-hub push ./base ./unlearned --to ./unlearned-sage --dry-run""",
    "sanitize": """BASE UNLEARNED --output DIR [options]
The same as push, into a local folder.
  sage-hub sanitize org/base@v1 ./unlearned --output ./release \\
      --retain retain.jsonl""",
    "plan": """BASE [UNLEARNED] [options]
Show what a run takes, without running it; from headers alone.
  sage-hub plan org/base
  sage-hub plan org/base org/unlearned --memory 14 --max-tokens 50000""",
    "init": """BASE UNLEARNED [options]
Write a sage.yaml for this pair, with what to decide, and say what comes next.
  sage-hub init org/base org/unlearned
  sage-hub init ./base ./unlearned --output settings.yaml""",
    "data": """[PROXY …] [options]
Show how rows will be read, before anything is run on them.
  sage-hub data forget.jsonl
  sage-hub data --retain retain.jsonl --forget forget.jsonl \\
      --heldout heldout.jsonl --tokenizer org/base""",
    "stats": """MODEL (--output FILE | --to REPO) [options]
Calibrate MODEL once and keep the statistics for --stats.
  sage-hub stats org/base --retain retain.jsonl --forget forget.jsonl \\
      --output base.safetensors
  sage-hub push org/base org/unlearned --stats base.safetensors
  sage-hub stats org/base --retain one.jsonl --retain two.jsonl --output stats
  sage-hub stats org/base --retain retain.jsonl --to org/base-sage-stats
  sage-hub push org/base org/unlearned --stats org/base-sage-stats""",
    "audit": """BASE UNLEARNED [options]
Show how much the update disturbs what should be kept.
  sage-hub audit org/base org/unlearned --retain retain.jsonl --strength 10""",
    "eval": """MODEL [MODEL …] [options]
Evaluate models on the same rows and compare them with the first.
  sage-hub eval org/base org/unlearned --forget forget.jsonl \\
      --heldout heldout.jsonl
  sage-hub eval ./base ./unlearned ./release --forget forget.jsonl \\
      --bystander world_facts=facts.jsonl --reference org/retain-only \\
      --robustness""",
    "card": """DIR [options]
Write the card of a release again, from its record.
  sage-hub card ./release
  sage-hub card ./release --card-template short""",
    "verify": """RELEASE [options]
Compare every file of RELEASE with its manifest.
  sage-hub verify ./release
  sage-hub verify org/unlearned-sage
  sage-hub verify org/unlearned-sage --rebuild""",
    "review": """RELEASE [options]
Make a page to look at: verdict, pictures, and answers side by side.
  sage-hub review ./release
  sage-hub review org/unlearned-sage --output review.html --no-open""",
    "demo": """[options]
Make a small unlearning problem and run the main job on it.
  sage-hub demo
  sage-hub demo --model smollm2 --output ./smollm2-demo""",
    "env": """[--json]
Describe this machine for a bug report; no names, no secrets.
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
        epilog=EXAMPLES,
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
    for name, text in COMMANDS.items():
        usage, what, examples = text.split("\n", maxsplit=2)
        command = commands.add_parser(
            name,
            prog=f"sage-hub {name}",
            usage=f"sage-hub {name} {usage}",
            help=what,
            epilog=f"examples:\n{examples}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command, name)
        takes_proxies = any(action.metavar == "PROXY" for action in command._actions)
        about = f"{what} {PROXY_HELP}" if takes_proxies else what
        command.description = textwrap.fill(about, 79, break_on_hyphens=False)
    return parser, commands.choices
