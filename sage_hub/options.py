"""What a person may type: commands, options, their help, and what is said of a mistyped one."""

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
  sage-hub stats org/base --retain retain.jsonl --output base.safetensors
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
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            raise UsageError(
                f"{parser.prog} has no option {name}; {_nearest(name, known, parser.prog)}"
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

    def add(name: str, usage: str, what: str, *, proxies: bool = False) -> argparse.ArgumentParser:
        about = f"{what} {PROXY_HELP}" if proxies else what
        return commands.add_parser(
            name,
            prog=f"sage-hub {name}",
            usage=f"sage-hub {name} {usage}",
            help=what,
            description=textwrap.fill(about, 79, break_on_hyphens=False),
            epilog=EXAMPLES[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    push = add(
        "push",
        "BASE UNLEARNED [--to TARGET] [options]",
        "Sanitize the update from BASE to UNLEARNED and publish it.",
        proxies=True,
    )
    _add_sources(push)
    _add_data(push, "retain", "forget", "heldout")
    release = push.add_argument_group("the release")
    release.add_argument(
        "--to",
        metavar="TARGET",
        help="Hub repo or folder (default: UNLEARNED with -sage)",
    )
    _add_publication(release)
    _add_release_options(release)
    _add_evaluation(push)
    _add_record(push)
    _add_settings(push)
    _add_run_options(push)

    sanitize = add(
        "sanitize",
        "BASE UNLEARNED --output DIR [options]",
        "The same as push, into a local folder.",
        proxies=True,
    )
    _add_sources(sanitize)
    _add_data(sanitize, "retain", "forget", "heldout")
    release = sanitize.add_argument_group("the release")
    release.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="write it into this folder"
    )
    _add_release_options(release)
    _add_evaluation(sanitize)
    _add_record(sanitize)
    _add_settings(sanitize)
    _add_run_options(sanitize)

    plan = add(
        "plan",
        "BASE [UNLEARNED] [options]",
        "Show what a run takes, without running it; from headers alone.",
        proxies=True,
    )
    plan.add_argument("base", metavar="BASE", help="repo[@revision] or folder, or a config alone")
    plan.add_argument("unlearned", metavar="UNLEARNED", nargs="?", help="the same, if there is one")
    plan.add_argument("--to", metavar="TARGET", help="Hub repo or folder")
    plan.add_argument("--stats", metavar="FILE|REPO", help="ready statistics of BASE")
    plan.add_argument("--verbose", "-v", action="store_true", help="tensor by tensor")
    _add_data(plan, "retain", "forget", "heldout")
    _add_settings(plan)
    _add_output_options(plan)

    stats = add(
        "stats",
        "MODEL (--output FILE | --to REPO) [options]",
        "Calibrate MODEL once and keep the statistics for --stats.",
        proxies=True,
    )
    stats.add_argument("model", metavar="MODEL", help="Hub repo[@revision] or folder")
    where = stats.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--output", type=Path, metavar="FILE", help="write them into this file, or folder"
    )
    where.add_argument("--to", metavar="REPO", help="publish them to this repo of the Hub")
    _add_publication(stats)
    stats.add_argument(
        "--force", action="store_true", help="replace a repo that holds something else"
    )
    _add_stats_cache(stats)
    _add_data(stats, "forget").add_argument(
        "--retain",
        metavar="PROXY",
        action="append",
        default=argparse.SUPPRESS,
        help="what must be kept (default: a general-purpose proxy); given several times, --output "
        "is a folder, and each gets a file there, from one pass over the weights",
    )
    _add_settings(stats, skip=("strength", "gain", "parameters"))
    _add_output_options(stats)

    audit = add(
        "audit",
        "BASE UNLEARNED [options]",
        "Show how much the update disturbs what should be kept.",
        proxies=True,
    )
    _add_sources(audit)
    audit.add_argument(
        "--top", type=_whole, default=15, metavar="N", help="modules to show (default: 15)"
    )
    audit.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with pictures into this file too"
    )
    _add_data(audit, "retain", "forget")
    _add_settings(audit, skip=("gain",))
    _add_output_options(audit)

    evaluate = add(
        "eval",
        "MODEL [MODEL …] [options]",
        "Evaluate models on the same rows and compare them with the first.",
        proxies=True,
    )
    evaluate.add_argument("models", metavar="MODEL", nargs="+", help="repo[@revision] or folder")
    _add_data(evaluate, "retain", "forget", "heldout")
    _add_evaluation(evaluate)
    _add_settings(evaluate, skip=METHOD)
    _add_output_options(evaluate)

    card = add("card", "DIR [options]", "Write the card of a release again, from its record.")
    card.add_argument("release", metavar="DIR", type=Path, help="the folder of the release")
    _add_card_template(card)
    _add_output_options(card)

    verify = add("verify", "RELEASE [options]", "Compare every file of RELEASE with its manifest.")
    verify.add_argument("release", metavar="RELEASE", help="Hub repo[@revision] or folder")
    verify.add_argument(
        "--rebuild",
        action="store_true",
        help="make it again from the recorded commits and settings, and compare; local files are "
        "looked for in the current folder",
    )
    _add_output_options(verify)

    demo = add("demo", "[options]", "Make a small unlearning problem and run the main job on it.")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("sage-demo"),
        metavar="DIR",
        help="write everything into this folder (default: sage-demo)",
    )
    demo.add_argument(
        "--model",
        choices=("people", "smollm2"),
        default="people",
        help="made-up people in a model trained here, or SmolLM2-135M (default: people)",
    )
    demo.add_argument(
        "--method", choices=("npo", "ga"), default="npo", help="how to unlearn (default: npo)"
    )
    demo.add_argument("--force", action="store_true", help="replace what is in the folder")
    _add_settings(demo)
    _add_output_options(demo)
    demo.set_defaults(seed=0)

    env = add("env", "[--json]", "Describe this machine for a bug report; no names, no secrets.")
    env.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    env.set_defaults(quiet=False)
    return parser, commands.choices


def _add_publication(command: argparse._ActionsContainer) -> None:
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


def _add_release_options(command: argparse._ActionsContainer) -> None:
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
        type=Path,
        metavar="DIR",
        help="leave a copy of the card and the record (sage/) in this folder too",
    )


def _add_run_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("this run")
    group.add_argument(
        "--dry-run", action="store_true", help="show the plan and its problems, and stop"
    )
    group.add_argument("--verbose", "-v", action="store_true", help="list the plan by tensor")
    group.add_argument("--yes", "-y", action="store_true", help="don't ask before publishing")
    _add_output_options(group)


def _add_evaluation(command: argparse.ArgumentParser) -> None:
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
        type=_whole,
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


def _add_record(command: argparse.ArgumentParser) -> None:
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
    _add_card_template(group)


def _add_card_template(command: argparse._ActionsContainer) -> None:
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


def _add_stats_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--stats-cache",
        type=Path,
        metavar="DIR",
        help="take statistics from this folder if they are there, else leave them there",
    )


def _add_data(command: argparse.ArgumentParser, *sets: str) -> argparse._ArgumentGroup:
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
            f"--{name}", metavar="PROXY", default=argparse.SUPPRESS, help=helps[name]
        )
    return group


def _add_settings(command: argparse.ArgumentParser, *, skip: Sequence[str] = ()) -> None:
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
    add("rank", _whole, "K", "protect at most K directions per site")
    add("gain", _gain, "γ", "turn up what remains: a number, 'match' or 'auto' (default: auto)")
    if "gain" not in skip:
        add("target", _number, "LEVEL", "of the forget set, for 'auto' (default: the source's)")
    add("max_tokens", _whole, "N", "tokens of each proxy to calibrate on (default: 131072)")
    add("max_length", _whole, "N", "longest row in tokens (default: 2048)")
    add("batch_size", _whole, "N", "rows at a time (default: 8)")
    add("device", str, "DEVICE", "cpu, cuda, mps (default: cuda if there is one)")
    add("seed", _whole, "N", "for the choice of rows (default: 0)")
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


def _add_output_options(command: argparse._ActionsContainer) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    command.add_argument("--quiet", "-q", action="store_true", help="no plan, notes or bars")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _gain(text: str) -> float | str:
    return text if text in ("match", "auto") else _number(text)
