"""The two sides of an update, each opened once."""

from __future__ import annotations

from dataclasses import dataclass

from sage_hub.checkpoint.adapter import is_adapter, open_adapter
from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.checkpoint.merged import merged
from sage_hub.checkpoint.pickled import unpickled
from sage_hub.errors import UsageError


@dataclass(frozen=True)
class Pair:
    """A model before unlearning, and after it: whole, or as an adapter of the first."""

    base: Checkpoint
    unlearned: Checkpoint

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """Both, by their names in the record."""
        return {"base": self.base, "unlearned": self.unlearned}


def open_pair(base: str, unlearned: str, *, merge: bool = False, pickled: bool = False) -> Pair:
    """Open both sides, repos (`org/name[@revision]`) or folders: configs and headers alone.

    Raises the errors of `open_checkpoint` and `open_unlearned`.
    """
    first = open_checkpoint(base, pickled=pickled, dequantize=True)
    return Pair(first, open_unlearned(unlearned, first, merge=merge, pickled=pickled))


def open_unlearned(
    text: str, base: Checkpoint, *, merge: bool = False, pickled: bool = False
) -> Checkpoint:
    """Open the unlearned side that `text` names: a whole model, or an adapter of `base`.

    With `merge` an adapter is seen as the whole model that it makes of the base. Raises
    AdapterError for an adapter that is not a plain LoRA, UsageError if there is nothing to merge.
    """
    files = unpickled(open_files(text)) if pickled else open_files(text)
    if is_adapter(files):
        adapter = open_adapter(files, base)
        return merged(adapter) if merge else adapter
    if merge:
        raise UsageError(f"--merge is for adapters, and {files.name} is a whole model.")
    return open_checkpoint(text, pickled=pickled)
