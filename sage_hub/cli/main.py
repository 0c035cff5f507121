"""Run one command: the one place where an error becomes a sentence and an exit status."""

from __future__ import annotations

import argparse
import ctypes
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
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
)


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
    from sage_hub.runtime.ranks import joined

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
        point([error], args)
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

    from sage_hub.hub.client import limit_silence, log

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


if __name__ == "__main__":
    sys.exit(main())
