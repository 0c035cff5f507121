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
    "audit": "auditing",
    "collect_statistics": "collect",
    "evaluate_models": "compare",
    "Publication": "target",
    "push": "release",
    "sanitize": "release",
    "Release": "release",
    "Settings": "settings",
    "SageHubError": "errors",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from sage_hub.auditing import audit as audit
    from sage_hub.collect import collect_statistics as collect_statistics
    from sage_hub.compare import evaluate_models as evaluate_models
    from sage_hub.errors import SageHubError as SageHubError
    from sage_hub.release import Release as Release
    from sage_hub.release import push as push
    from sage_hub.release import sanitize as sanitize
    from sage_hub.settings import Settings as Settings
    from sage_hub.target import Publication as Publication


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"sage_hub.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sage_hub' has no attribute {name!r}")
