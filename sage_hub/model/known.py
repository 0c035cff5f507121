"""What a run on shapes shows of a model, kept on disk: it depends on its class and config alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedModel

from sage_hub.checkpoint.files import digest
from sage_hub.runtime.shelf import keep, recall
from sage_hub.runtime.versions import versions

T = TypeVar("T")

FORMAT = 1  # of what is kept; another one is found out anew


def known(
    model: PreTrainedModel, what: str, find: Callable[[], Any], read: Callable[[Any], T]
) -> T:
    """What `read` makes of what `find` gives, JSON, found out once for this class and config.

    A disk that cannot be read or written, or holds something else, is no hindrance.
    """
    kind = type(model)
    key = digest(
        {
            "what": [what, FORMAT],
            "class": [kind.__module__, kind.__qualname__],
            "config": model.config.to_json_string(),
            "versions": versions(),
        }
    )
    try:
        return read(recall("shapes", key))
    except (LookupError, ValueError, TypeError):
        found = find()
    keep("shapes", key, found)
    return read(found)
