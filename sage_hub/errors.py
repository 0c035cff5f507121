"""Everything that can go wrong with the user's input, each with its own exit status.

A command has no try/except of its own: it raises one of these, `cli.main` prints the sentence on
stderr and exits with `status`. A sentence says what is wrong, where, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


class SageHubError(Exception):
    """Base of all errors that are explained to the user in one sentence."""

    status = 1
    final = True  # the same command will fail the same way: its finished parts need not be kept
    setting = ""  # the one that it is about, if it is about one
    where = ""  # its option, or its line in a file
    release: Any = None  # what was made in spite of it
    kept: dict[str, str] | None = None  # `what` is finished and not lost, and `where` it is

    def __str__(self) -> str:
        """One line, whatever a hostile file put into it; it ends in an option or a place."""
        said = super().__str__()
        told = not self.where or (self.where.startswith("--") and " --" in f" {said}")
        return printable(said if told else f"{said} See {self.where}.")


@contextmanager
def about(setting: str, option: str) -> Iterator[None]:
    """What is raised in here is about this setting, unless it is about another."""
    try:
        yield
    except SageHubError as error:
        if not error.setting:
            error.setting, error.where = setting, option
        raise


def note_kept(error: BaseException, what: str, where: object) -> None:
    """Have `error` say that `what` is finished is kept `where`, if it says nothing of it yet."""
    vars(error).setdefault("kept", {"what": what, "where": str(where)})


def printable(text: str) -> str:
    """`text` on one line, with all that a terminal obeys or hides escaped, and no token."""
    text = TOKEN.sub("hf_…", text)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line with words in what a library says, else the name of its error."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class UsageError(SageHubError):
    """A wrong option or a wrong key or value in sage.yaml."""

    status = 2


class NotFoundError(SageHubError):
    """A repo, revision, folder or file that does not exist."""

    status = 10
    final = False


class AccessError(SageHubError):
    """The Hub wants a token, another token, or an accepted licence."""

    status = 11
    final = False


class ArchitectureError(SageHubError):
    """The two sides are not the same model, or not one that transformers can build."""

    status = 12


class MissingTensorError(SageHubError):
    """A tensor that one side has and the other has not."""

    status = 13


class NothingToDoError(SageHubError):
    """Base and unlearned hold the same weights, or differ in nothing that is filtered."""

    status = 14


class NonFiniteError(SageHubError):
    """NaN or Inf in a weight or an activation."""

    status = 15


class PickledWeightsError(SageHubError):
    """The only weights are pickles: not asked for by name, or of more than tensors."""

    status = 16


class CorruptCheckpointError(SageHubError):
    """A safetensors file, index or config that cannot be what it claims to be."""

    status = 17
    final = False  # a download may have been cut


class ProxyError(SageHubError):
    """A proxy that is empty, malformed or of unknown format."""

    status = 18


class OverlapError(SageHubError):
    """The same row in two sets that must be disjoint."""

    status = 19


class QuantizedError(SageHubError):
    """A quantized checkpoint, whose stored numbers are not the weights."""

    status = 20


class DiskSpaceError(SageHubError):
    """Not enough free disk for the run."""

    status = 21
    final = False


class StatisticsError(SageHubError):
    """A statistics file of another model, tokenizer, setting or format."""

    status = 22


class TargetError(SageHubError):
    """A target that is not ours to overwrite, or that another run is writing."""

    status = 23


class PublishError(SageHubError):
    """The Hub did not take the release; the target is as it was."""

    status = 24
    final = False


class NetworkError(SageHubError):
    """The Hub did not answer, or answered with a server error."""

    status = 25
    final = False


class AdapterError(SageHubError):
    """An adapter that is not a plain LoRA, or that cannot be merged."""

    status = 28


class VerificationError(SageHubError):
    """A release that is not what its record says."""

    status = 27


class PeerError(SageHubError):
    """Another process of the same job (torchrun) has failed."""

    status = 29
    final = False


class GateError(SageHubError):
    """A release that does not meet a gate: `release` is kept, and not published."""

    status = 30
    final = False

    def __init__(self, sentence: str, release: Any) -> None:
        super().__init__(sentence)
        self.release = release
        note_kept(self, release.lies, release.location)

    def __reduce__(self) -> Any:  # as it goes to the other processes of a job
        return type(self), (*self.args, self.release)


class ResultsError(SageHubError):
    """Results made elsewhere that cannot be read, or are of another checkpoint."""

    status = 31


class OutOfMemoryError(SageHubError):
    """Host or device memory ran out."""

    status = 26
    final = False


class Interrupted(SageHubError):  # noqa: N818 - nothing went wrong
    """Ctrl-C, or the system asked the process to end."""

    status = 130
    final = False
