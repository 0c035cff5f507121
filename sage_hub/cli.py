"""What a person types: commands, options, exit statuses. A thin layer over `sage_hub.release`."""

from __future__ import annotations

import argparse
import ctypes
import errno
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sage_hub import __version__
from sage_hub.errors import DiskSpaceError, OutOfMemoryError, SageHubError, first_line
from sage_hub.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the only place where an error becomes a sentence and a status."""
    args = _parser().parse_args(argv)
    # A runner that stops the job must find no half-written folder, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        return _together(args)
    return _run_command(args)


def _together(args: argparse.Namespace) -> int:
    """Run the command as one of several processes, of which the first one talks."""
    from sage_hub.ranks import joined

    with joined() as args.ranks:
        args.quiet = args.quiet or not args.ranks.first
        with redirect_stdout(sys.stdout if args.ranks.first else io.StringIO()):
            status = _run_command(args)
        if status == 0:
            status = _leave_together(args.ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the process group may abort an interpreter that shuts down, after all was done.
    os._exit(status)


def _leave_together(ranks: Any) -> int:
    """Wait for the others, because a group that falls apart is an error to those still in it."""
    try:
        ranks.all(None)
    except SageHubError as error:
        return _fail(str(error), error.status)
    return 0


def _run_command(args: argparse.Namespace) -> int:
    try:
        _prepare_client(args)
        args.command(args)
        sys.stdout.flush()
    except SageHubError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("Interrupted; the same command goes on where this one stopped.", 130)
    except BrokenPipeError:
        # The reader of stdout went away, as `| head` does; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("SAGE_HUB_DEBUG"):
            traceback.print_exc()
        known = _explain_machine(error)
        if known is not None:
            return _fail(str(known), known.status)
        return _fail(
            f"Internal error ({type(error).__name__}: {first_line(error)}). Please report it "
            "with the traceback that SAGE_HUB_DEBUG=1 prints.",
            1,
        )
    return 0


def _prepare_client(args: argparse.Namespace) -> None:
    """Have the Hub's client not wait forever, and not talk where nobody listens."""
    from huggingface_hub.utils.logging import set_verbosity

    from sage_hub.hub import limit_silence, log

    limit_silence()
    log.handlers = [logging.StreamHandler()]
    level = logging.ERROR if args.quiet else logging.WARNING
    log.setLevel(level)
    set_verbosity(level)


def _keep_freed_memory() -> None:
    """Have the C library use freed blocks again instead of handing each back to the system.

    The pass frees and takes blocks of a few megabytes all the time; to have every one of their
    pages zeroed anew takes a third of its time.
    """
    mmap_threshold, trim_threshold = -3, -1  # of glibc's malloc.h
    with suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 << 20)
        library.mallopt(trim_threshold, 1 << 30)


def _fail(sentence: str, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"sage-hub: error{where}: {sentence}", file=sys.stderr)
    return status


def _explain_machine(error: Exception) -> SageHubError | None:
    """A full disk or memory, which any line of ours or of a library may run into."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            "The disk is full; nothing was published. Free some space, or set --output or "
            "HF_HOME to a larger disk."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            "Memory ran out; lower --memory to what this machine has free, or --batch-size or "
            "--max-length."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return SageHubError(f"{error.filename}: {error.strerror}.")
    return None


def _push(args: argparse.Namespace) -> None:
    from sage_hub import jobs

    target = jobs.choose_target(args.to, args.unlearned)
    _run(args, target, {"publication": _publication(args)})


def _publication(args: argparse.Namespace) -> Any:
    from sage_hub.target import Publication

    return Publication(
        branch=args.branch,
        create_pr=args.create_pr,
        tag=args.tag,
        private=args.private,
        message=args.commit_message,
        token=args.token or os.environ.get("SAGE_HUB_WRITE_TOKEN", "").strip() or None,
    )


def _sanitize(args: argparse.Namespace) -> None:
    from sage_hub.checkpoint import Location

    _run(args, Location(folder=args.output), {})


def _run(args: argparse.Namespace, target: Any, options: dict[str, Any]) -> None:
    """Plan, show the plan, ask if a person is there to be asked, run, show the result."""
    from sage_hub import display, jobs, release

    progress = _progress(args)
    job = jobs.survey(
        args.base,
        args.unlearned,
        target,
        settings=_settings(args, args.unlearned),
        statistics=args.stats,
        stats_cache=args.stats_cache,
        ranks=_ranks(args),
        force=args.force,
        **options,
    )
    progress.note(display.plan_text(job, verbose=args.verbose))
    if args.dry_run:
        if args.json:
            _print_json(display.plan_json(job))
        if job.problems:
            raise job.problems[0]
        return
    job = jobs.check_weights(job, progress)
    if target.folder is None and not args.yes and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"Publish to {target.repo}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            progress.note("Nothing was done.")
            return
    done = release.run(job, progress)
    if args.json:
        _print_json(display.release_json(done))
    else:
        print(display.release_text(done))


def _stats(args: argparse.Namespace) -> None:
    from sage_hub.collect import collect_statistics

    result = collect_statistics(
        args.model,
        args.output,
        to=args.to,
        settings=_settings(args, None),
        stats_cache=args.stats_cache,
        ranks=_ranks(args),
        publication=_publication(args),
        force=args.force,
        progress=_progress(args),
    )
    if args.json:
        _print_json(result)
    else:
        print(result.get("location") or args.output)


def _audit(args: argparse.Namespace) -> None:
    from sage_hub import display, release

    result = release.audit(
        args.base,
        args.unlearned,
        settings=_settings(args, args.unlearned),
        statistics=args.stats,
        stats_cache=args.stats_cache,
        progress=_progress(args),
    )
    if args.json:
        _print_json(result)
    else:
        print(display.audit_text(result, top=args.top))


def _plan(args: argparse.Namespace) -> None:
    from sage_hub import display, jobs

    settings = _settings(args, None)
    found = jobs.forecast(args.base, settings)
    if args.unlearned is None:
        if args.json:
            _print_json(found.describe())
        else:
            print(display.forecast_text(found))
        return
    target = jobs.choose_target(args.to, args.unlearned)
    job = jobs.survey(
        args.base,
        args.unlearned,
        target,
        settings=settings,
        statistics=args.stats,
    )
    if args.json:
        _print_json(display.plan_json(job) | {"estimate": found.describe()})
    else:
        print(f"{display.plan_text(job, verbose=args.verbose)}\n\n{display.forecast_text(found)}")


def _verify(args: argparse.Namespace) -> None:
    from sage_hub import display, release
    from sage_hub.errors import VerificationError
    from sage_hub.verify import verify

    progress = _progress(args)
    found = verify(args.release, progress)
    if args.rebuild:
        again = release.rebuild(args.release, progress)
        found = replace(found, differences=(*found.differences, *again))
    if args.json:
        _print_json(asdict(found))
    else:
        print(display.verification_text(found))
    if found.differences:
        raise VerificationError(
            f"{found.name} is not what its manifest says: {len(found.differences)} "
            f"difference{'s' if len(found.differences) > 1 else ''}."
        )


def _demo(args: argparse.Namespace) -> None:
    from sage_hub import demo, display

    done, commands = demo.run(
        args.output,
        model=args.model,
        method=args.method,
        seed=args.seed,
        given=_given(args),
        force=args.force,
        progress=_progress(args),
    )
    if args.json:
        _print_json(display.release_json(done) | {"commands": commands})
    else:
        print(display.release_text(done))
        print("\nRun it again by hand:\n")
        print("\n".join(f"  {command}" for command in commands))


def _progress(args: argparse.Namespace) -> Progress:
    """What a person watches; the bars of huggingface_hub show where ours do."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (disable_progress_bars if args.quiet or not sys.stderr.isatty() else enable_progress_bars)()
    return Progress(quiet=args.quiet)


def _ranks(args: argparse.Namespace) -> Any:
    from sage_hub.ranks import ALONE

    return getattr(args, "ranks", ALONE)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line, and no others."""
    from sage_hub.settings import Settings

    names = [field.name for field in fields(Settings)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _settings(args: argparse.Namespace, unlearned: str | None) -> Any:
    from sage_hub.checkpoint import open_files
    from sage_hub.settings import CONFIG, load_settings

    given = _given(args)
    if args.config is not None or Path(CONFIG).is_file() or unlearned is None:
        return load_settings(given, config=args.config, unlearned=None)
    return load_settings(given, config=None, unlearned=open_files(unlearned))


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _gain(text: str) -> float | str:
    return text if text == "match" else float(text)


_gain.__name__ = "number or 'match'"  # argparse shows it in "invalid ... value"

PROXY_HELP = (
    "A proxy is a .jsonl, .json, .csv, .parquet or .txt file, or "
    "hf://datasets/org/name[@revision][/file][?config=NAME&split=NAME], with the columns "
    "question/answer, prompt/completion, messages or text."
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
    "verify": """examples:
  sage-hub verify ./release
  sage-hub verify org/unlearned-sage
  sage-hub verify org/unlearned-sage --rebuild""",
    "demo": """examples:
  sage-hub demo
  sage-hub demo --model smollm2 --output ./smollm2-demo""",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sage-hub",
        description="Repair an unlearned language model from its two checkpoints, and publish it.",
        epilog="Exit statuses: see the README. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"sage-hub {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], what: str) -> Any:
        command = commands.add_parser(
            name,
            help=what,
            description=what if name in ("demo", "verify") else f"{what} {PROXY_HELP}",
            epilog=EPILOG[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=run)
        return command

    push = add("push", _push, "Sanitize the update from BASE to UNLEARNED and publish it.")
    _add_sources(push)
    push.add_argument(
        "--to",
        metavar="TARGET",
        help="Hub repo or folder (default: UNLEARNED with -sage)",
    )
    _add_publication(push)
    sanitize = add("sanitize", _sanitize, "The same as push, into a local folder.")
    _add_sources(sanitize)
    sanitize.add_argument("--output", type=Path, required=True, metavar="DIR")
    for command in (push, sanitize):
        _add_release_options(command)
        _add_settings(command, "retain", "forget", "heldout")

    plan = add("plan", _plan, "Show what a run takes, without running it; from headers alone.")
    plan.add_argument("base", metavar="BASE", help="repo[@revision] or folder, or a config alone")
    plan.add_argument("unlearned", metavar="UNLEARNED", nargs="?", help="the same, if there is one")
    plan.add_argument("--to", metavar="TARGET", help="Hub repo or folder")
    plan.add_argument("--stats", metavar="FILE|REPO", help="ready statistics of BASE")
    plan.add_argument("--verbose", "-v", action="store_true", help="tensor by tensor")
    _add_settings(plan, "retain", "forget", "heldout")

    stats = add("stats", _stats, "Calibrate MODEL once and keep the statistics for --stats.")
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

    audit = add("audit", _audit, "Show how much the update disturbs what should be kept.")
    _add_sources(audit)
    audit.add_argument(
        "--top", type=int, default=15, metavar="N", help="modules to show (default: 15)"
    )
    _add_settings(audit, "retain", "forget", skip=("gain",))

    verify = add("verify", _verify, "Compare every file of RELEASE with its manifest.")
    verify.add_argument("release", metavar="RELEASE", help="Hub repo[@revision] or folder")
    verify.add_argument(
        "--rebuild",
        action="store_true",
        help="make it again from the recorded commits and settings, and compare; local files are "
        "looked for in the current folder",
    )
    _add_output_options(verify)

    demo = add("demo", _demo, "Make a small unlearning problem and run the main job on it.")
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
    command.add_argument(
        "--moments",
        choices=("auto", "exact", "sketch"),
        default=absent,
        help="second moments exact or sketched; auto: exact where --memory allows (default: auto)",
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


if __name__ == "__main__":
    sys.exit(main())
