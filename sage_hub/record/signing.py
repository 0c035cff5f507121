"""A signature of SHA256SUMS by a command of the user's, so that a release says who made it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from sage_hub.errors import UsageError, printable
from sage_hub.record.sums import SUMS, signatures_in


def check_signer(command: str | None) -> None:
    """Raise UsageError for a command that could not be run."""
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--sign is no command ({error}); check its quotes.") from None
    if not words or shutil.which(words[0]) is None:
        what = f"there is no program {words[0]}" if words else "it is empty"
        raise UsageError(f"--sign cannot be run: {what}.")


def sign(folder: Path, command: str) -> None:
    """Have `command` sign the sums of the release in `folder`, which come behind its words.

    It leaves its signature beside them, as SHA256SUMS.asc or the like. Raises UsageError if it
    fails or leaves none; the release is kept for another one.
    """
    check_signer(command)
    words = [*shlex.split(command), SUMS]
    done = subprocess.run(
        words, cwd=folder, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip().splitlines()
        why = f"it ended with {done.returncode}" + (f": {printable(said[-1])}" if said else "")
    elif not signatures_in(folder):
        why = f"it left no {SUMS}.asc, or {SUMS}. with another ending, beside them"
    else:
        return
    failure = UsageError(f"--sign {words[0]} has not signed {SUMS}: {why}.")
    failure.final = False  # all but the signature is done
    raise failure
