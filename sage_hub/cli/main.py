"""Run one command: the one place where an error becomes a sentence and an exit status."""

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
from pathlib import Path
from typing import Any

from sage_hub.cli import github, parser
from sage_hub.cli.commands import COMMANDS
from sage_hub.cli.given import point
from sage_hub.errors import (
    DiskSpaceError,
    Interrupted,
    OutOfMemoryError,
    SageHubError,
    UsageError,
    first_line,
    printable,
)

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the only place where an error becomes a sentence and a status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parser.parse(words)
    except UsageError as error:
        return _fail(error, argparse.Namespace(json="--json" in words))
    # A runner that stops the job must find no half-written folder, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        try:
            return _together(args)
        except SageHubError as error:  # there is no group
            return _fail(error, args)
    return _run_command(args)


def _together(args: argparse.Namespace) -> int:
    """Run the command as one of several processes, of which the first one talks."""
    from sage_hub.runtime.ranks import joined

    with joined() as args.ranks:
        args.quiet = args.quiet or not args.ranks.first
        with redirect_stdout(sys.stdout if args.ranks.first else io.StringIO()):
            # A group that falls apart is an error to those still in it, so all leave together.
            status = _run_command(args, leave=lambda: args.ranks.all(None))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the process group may abort an interpreter that shuts down, after all was done.
    os._exit(status)


def _run_command(args: argparse.Namespace, leave: Callable[[], object] = lambda: None) -> int:
    """Run the command and `leave`; the exit status."""
    try:
        with github.commands_off(os.environ):
            _prepare_client(args)
            COMMANDS[args.command](args)
            leave()
            if "result" in args:
                _print_json(args.result)
            sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()
    except (Exception, KeyboardInterrupt) as error:
        return _fail(_explained(error, args), args)
    return 0


def _explained(error: BaseException, args: argparse.Namespace) -> SageHubError:
    """What went wrong, as an error that is one sentence."""
    if isinstance(error, SageHubError):
        point([error], args)
        return error
    if isinstance(error, KeyboardInterrupt):
        resumes = args.command in ("push", "sanitize", "stats")
        how = "; the same command goes on where this one stopped" if resumes else ""
        found: SageHubError = Interrupted(f"Interrupted{how}.")
    else:
        if os.environ.get("SAGE_HUB_DEBUG"):
            with github.commands_off(os.environ):
                print(
                    *map(printable, traceback.format_exc().splitlines()), sep="\n", file=sys.stderr
                )
        found = _explain_machine(error) or SageHubError(
            f"Internal error ({type(error).__name__}: {first_line(error)}). Please report it "
            "with what `sage-hub env` prints and the traceback that SAGE_HUB_DEBUG=1 prints."
        )
    found.kept = getattr(error, "kept", None)
    return found


def _stop_writing() -> None:
    """Write to nowhere: the reader of stdout went away, as `| head` does, which is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_client(args: argparse.Namespace) -> None:
    """Have the Hub's client not wait forever, and not talk where nobody listens."""
    from huggingface_hub.utils.logging import set_verbosity

    from sage_hub.hub.client import limit_silence, log

    limit_silence()
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].setFormatter(_OneLine())
    level = logging.ERROR if args.quiet else logging.WARNING
    log.setLevel(level)
    set_verbosity(level)


class _OneLine(logging.Formatter):
    """What the Hub said, as a terminal may be shown it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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


def _fail(error: SageHubError, args: argparse.Namespace) -> int:
    """Say what went wrong, to people and to machines; the exit status."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    with github.commands_off(os.environ):
        print(f"sage-hub: error{where}: {error}", file=sys.stderr)
        if args.json and rank == "0":
            try:
                _print_json({**vars(args).get("result", {}), **_failure(error)})
            except OSError:  # stderr has it
                _stop_writing()
    github.annotate(str(error), os.environ)
    return error.status


def _failure(error: SageHubError) -> dict[str, Any]:
    """An error for `--json`. What is kept must be there still: a folder of ours may have gone."""
    kept = error.kept
    if kept and not kept["where"].startswith(("http://", "https://")):
        kept = kept if Path(kept["where"]).exists() else None
    kind = type(error).__name__
    return {"status": error.status, "error": kind, "message": str(error), "kept": kept}


def _print_json(content: Any) -> None:
    """Print the one object of `--json`."""
    lines = json.dumps(content, indent=2, ensure_ascii=False).split("\n")
    print("\n".join("".join(map(_in_json, line)) for line in lines), flush=True)


def _in_json(character: str) -> str:
    """A character of a text in JSON; what a terminal obeys or hides is written by its number."""
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _explain_machine(error: BaseException) -> SageHubError | None:
    """A full disk or memory, which any line of ours or of a library may run into."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            "The disk is full; nothing was published. Free some space, or set --output, "
            "HF_HOME or TMPDIR to a larger disk."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            "Memory ran out; lower --memory to what this machine has free, or --batch-size or "
            "--max-length."
        )
    if isinstance(error, OSError) and error.filename is None and error.errno in NO_LOCKS:
        return UsageError(
            f"A file system here knows no locks ({error.strerror}), which the Hub's client needs "
            "for what it keeps; set HF_HOME to a folder of a disk of this machine."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return SageHubError(f"{error.filename}: {error.strerror}.")
    return None


if __name__ == "__main__":
    sys.exit(main())
