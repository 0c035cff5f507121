"""YAML of others, a card's metadata or settings: what is read is as large as its text."""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 1_000_000  # letters, which take PyYAML some seconds


class _Whole:
    """No alias is taken: by names that stand for others a short text can be a value of any size."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise yaml.YAMLError(f"it is longer than {LONGEST:,} letters")
        loader: Any = super()  # of YAML
        loader.__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        own: Any = self
        if own.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                problem="an alias is not taken; write out what it stands for",
                problem_mark=own.peek_event().start_mark,
            )
        loader: Any = super()
        return loader.compose_node(parent, index)


class Loader(_Whole, yaml.SafeLoader):
    """Numbers, truth values and texts."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = int(super().construct_yaml_int(node))
        str(number)  # raises ValueError for one that is too long to be shown
        return number


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


class TextLoader(_Whole, yaml.BaseLoader):
    """All as texts."""
