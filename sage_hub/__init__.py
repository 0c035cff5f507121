"""sage-hub: repair an unlearned language model from its two checkpoints, and publish it.

    import sage_hub
    release = sage_hub.sanitize("org/base", "org/unlearned", "out", settings=sage_hub.Settings())

The names below load on first use, so that `import sage_hub` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "audit": "commands.audit",
    "collect_statistics": "commands.stats",
    "evaluate_models": "commands.eval",
    "Publication": "publish.target",
    "push": "commands.push",
    "review": "commands.review",
    "sanitize": "commands.push",
    "Release": "record.release",
    "Review": "commands.review",
    "Settings": "settings",
    "SageHubError": "errors",
    "Progress": "runtime.progress",
    "Run": "runtime.run",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from sage_hub.commands.audit import audit as audit
    from sage_hub.commands.eval import evaluate_models as evaluate_models
    from sage_hub.commands.push import push as push
    from sage_hub.commands.push import sanitize as sanitize
    from sage_hub.commands.review import Review as Review
    from sage_hub.commands.review import review as review
    from sage_hub.commands.stats import collect_statistics as collect_statistics
    from sage_hub.errors import SageHubError as SageHubError
    from sage_hub.publish.target import Publication as Publication
    from sage_hub.record.release import Release as Release
    from sage_hub.runtime.progress import Progress as Progress
    from sage_hub.runtime.run import Run as Run
    from sage_hub.settings import Settings as Settings


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"sage_hub.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sage_hub' has no attribute {name!r}")
