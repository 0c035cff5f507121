"""Cells that hold several texts: a list, one text, or a list that a CSV file holds as text."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from sage_hub.errors import ProxyError

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_NUMBER = r"[-+]?\d[\d.eE+-]*"
_ITEM = re.compile(f"{_QUOTED}|{_NUMBER}", re.DOTALL)
# As Python prints a list, as NumPy prints an array (without commas), and as JSON has it.
_LIST = re.compile(rf"\[\s*(?:(?:{_QUOTED}|{_NUMBER})(?:\s*,\s*|\s+|(?=\])))*\]", re.DOTALL)


def texts_of(value: Any, what: str) -> tuple[str, ...]:
    """The texts in a cell, called `what`. A number is taken as text, one text is a list of one.

    Raises ProxyError for an item that is neither, or is empty: none is dropped.
    """
    if isinstance(value, str) and value.strip()[:1] == "[":
        value = _parse_list(value.strip(), what)
    if not isinstance(value, (list, tuple)):
        value = [value]
    texts = []
    for item in value:
        text = str(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else item
        if not isinstance(text, str) or not text.strip():
            raise ProxyError(f"{what} must be a text or a list of texts, none of them empty.")
        texts.append(text)
    return tuple(texts)


def _parse_list(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not _LIST.fullmatch(text):
        raise ProxyError(
            f"{what} looks like a list and is none that can be read; write it as JSON: "
            '["one", "two"].'
        )
    try:
        return [
            ast.literal_eval(item) if item[0] in "'\"" else item for item in _ITEM.findall(text)
        ]
    except (ValueError, SyntaxError):
        raise ProxyError(f"{what} holds a list with a text that cannot be read.") from None
