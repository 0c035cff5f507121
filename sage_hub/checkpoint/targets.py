"""Which modules PEFT adapts, by the settings of an adapter: what it does not adapt it ignores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def adapts(config: Mapping[str, Any], module: str) -> bool:
    """Whether LoRA with this `config` is put on `module`.

    Raises TypeError or re.error for settings that are none.
    """
    if any(re.match(rf"(.*\.)?{m}(\..*)?$", module) for m in config.get("modules_to_save") or ()):
        return False
    if _names(config.get("exclude_modules") or (), module):
        return False
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    return _names(targets, module) and (
        isinstance(targets, str) or module in targets or _in_layers(config, module)
    )


def _names(given: str | Sequence[str], module: str) -> bool:
    """Whether a pattern, or one of several ends of names, is that of `module`."""
    if isinstance(given, str):
        return re.fullmatch(given, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in given)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether `module` is in one of the layers that are adapted, if these are given."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1]) in (layers if isinstance(layers, list) else [layers])
    return False
