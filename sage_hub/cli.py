"""The commands, and the one place where an error becomes a sentence and an exit status."""

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
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, fields, replace
from typing import Any

from sage_hub import github, parser
from sage_hub.errors import (
    DiskSpaceError,
    GateError,
    Interrupted,
    NotFoundError,
    OutOfMemoryError,
    SageHubError,
    UsageError,
    first_line,
)
from sage_hub.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the only place where an error becomes a sentence and a status."""
    try:
        args = parser.parse(argv)
    except UsageError as error:
        return _fail(error)
    # A runner that stops the job must find no half-written folder, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        try:
            return _together(args)
        except SageHubError as error:  # there is no group
            return _fail(error)
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
        return _fail(error)
    return 0


def _run_command(args: argparse.Namespace) -> int:
    with github.commands_off(os.environ):
        error = _error_of(args)
    return 0 if error is None else _fail(error)


def _error_of(args: argparse.Namespace) -> SageHubError | None:
    """Run the command; what went wrong, if anything."""
    try:
        _prepare_client(args)
        COMMANDS[args.command](args)
        sys.stdout.flush()
    except SageHubError as error:
        return error
    except KeyboardInterrupt:
        resumes = args.command in ("push", "sanitize", "stats")
        how = "; the same command goes on where this one stopped" if resumes else ""
        return Interrupted(f"Interrupted{how}.")
    except BrokenPipeError:
        # The reader of stdout went away, as `| head` does; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if os.environ.get("SAGE_HUB_DEBUG"):
            traceback.print_exc()
        return _explain_machine(error) or SageHubError(
            f"Internal error ({type(error).__name__}: {first_line(error)}). Please report it "
            "with what `sage-hub env` prints and the traceback that SAGE_HUB_DEBUG=1 prints."
        )
    return None


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


def _fail(error: SageHubError) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    with github.commands_off(os.environ):
        print(f"sage-hub: error{where}: {error}", file=sys.stderr)
    github.annotate(str(error), os.environ)
    return error.status


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


def _run(args: argparse.Namespace, target: Any, how: dict[str, Any]) -> None:
    """Plan, show the plan, ask if a person is there to be asked, run, show the result."""
    from sage_hub import display, jobs, release
    from sage_hub.output import check_record

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
        **how,
    )
    progress.note(display.plan_text(job, verbose=args.verbose))
    if args.dry_run:
        if args.json:
            _print_json(display.plan_json(job))
        if job.problems:
            raise job.problems[0]
        return
    job = jobs.check_weights(job, progress)
    asks = target.folder is None and not args.yes
    if asks and not job.ranks.once(lambda: _agreed(target.repo)):
        progress.note("Nothing was done.")
        return
    if args.record is not None:
        check_record(args.record, target.folder)
        args.record.mkdir(parents=True, exist_ok=True)  # now, and not after hours
        job = replace(job, record=args.record)
    try:
        done = release.run(job, progress)
    except GateError as error:
        _show_release(args, error.release)
        raise
    _show_release(args, done)


def _agreed(repo: str) -> bool:
    """Whether the person at the terminal says yes; if there is none, the command has said it."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print(f"Publish to {repo}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _show_release(args: argparse.Namespace, done: Any) -> None:
    from sage_hub import display

    github.tell(display.release_json(done), os.environ)
    if args.json:
        _print_json(display.release_json(done))
    else:
        print(display.release_text(done))


def _stats(args: argparse.Namespace) -> None:
    from sage_hub.collect import collect_statistics

    several = vars(args).pop("retain", [])
    if len(several) == 1:
        args.retain = several.pop()
    result = collect_statistics(
        args.model,
        args.output,
        to=args.to,
        settings=_settings(args, None),
        retain=several,
        stats_cache=args.stats_cache,
        ranks=_ranks(args),
        publication=_publication(args),
        force=args.force,
        progress=_progress(args),
    )
    if args.json:
        _print_json(result)
    else:
        for one in result.get("statistics", [result]):
            print(one.get("location") or one["file"])


def _eval(args: argparse.Namespace) -> None:
    from sage_hub import display
    from sage_hub.compare import evaluate_models

    report = evaluate_models(
        args.models,
        settings=_settings(args, None),
        ranks=_ranks(args),
        progress=_progress(args),
    )
    if args.json:
        _print_json(report)
    else:
        print(display.evaluation_text(report))


def _card(args: argparse.Namespace) -> None:
    from sage_hub.card import rewrite

    written = rewrite(args.release, getattr(args, "card_template", None))
    if args.json:
        _print_json({"card": str(written)})
    else:
        print(written)


def _audit(args: argparse.Namespace) -> None:
    from sage_hub import display
    from sage_hub.auditing import audit
    from sage_hub.page import audit_page

    if args.html is not None and not args.html.parent.is_dir():
        raise NotFoundError(f"--html {args.html}: there is no folder {args.html.parent}.")
    if args.html is not None and args.html.is_dir():
        raise UsageError(f"--html {args.html} is a folder; give the file to write.")
    result = audit(
        args.base,
        args.unlearned,
        settings=_settings(args, args.unlearned),
        statistics=args.stats,
        stats_cache=args.stats_cache,
        progress=_progress(args),
    )
    if args.html is not None:
        args.html.write_text(audit_page(result), encoding="utf-8")
    if args.json:
        _print_json(result)
    else:
        print(display.audit_text(result, top=args.top))


def _plan(args: argparse.Namespace) -> None:
    from sage_hub import display, jobs

    settings = _settings(args, args.unlearned)
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
    from sage_hub import display
    from sage_hub.errors import VerificationError
    from sage_hub.rebuild import rebuild
    from sage_hub.verify import verify

    progress = _progress(args)
    found = verify(args.release, progress)
    if args.rebuild:
        again = rebuild(args.release, progress)
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


def _env(args: argparse.Namespace) -> None:
    from sage_hub import environment

    found = environment.describe()
    if args.json:
        _print_json(found)
    else:
        print(environment.text(found))


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
    from sage_hub.settings import load_settings, settings_file

    beside = None
    if unlearned is not None and settings_file(args.config, None) is None:
        beside = open_files(unlearned)
    settings = load_settings(_given(args), config=args.config, unlearned=beside)
    if file := settings_file(args.config, beside):
        _progress(args).note(f"Settings come from {file}; the command line wins.")
    return settings


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


COMMANDS = {
    "push": _push,
    "sanitize": _sanitize,
    "plan": _plan,
    "stats": _stats,
    "audit": _audit,
    "eval": _eval,
    "card": _card,
    "verify": _verify,
    "demo": _demo,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())
