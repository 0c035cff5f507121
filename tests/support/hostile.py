"""What a repo may hold to harm those who read it: texts that grow, never end, or are damaged."""

from __future__ import annotations

import json
import random
from typing import Any

# A template that is done after 10^10 rounds.
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# YAML of nine lines in which `*i` stands for 9^9 texts.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


# What a value of JSON may be in place of another.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, float("nan")),
    *("", "x", "\x1b[31m", "\ud800", "..", "/etc/passwd", "\n", "é" * 300, "1", "nan"),
    *([], {}, [[]], [None], {"a": None}, {"": ""}, [1, "2"], [[[[[[1]]]]]], float("-inf")),
)
# What may be put into a text of any kind.
PIECES = (
    *b"\x00|\x1b[2J|\r|\n|\t|\"|'|{|[|]|}|,|: |- |? |---\n|&a |*a |\\|\\u|null|NaN|-|0x".split(
        b"|"
    ),
    *b"{{ |{% | %}| }}|{% for a in b %}|{{ x.y.z }}|{{ 9**9**9 }}|<script>|..|../|1e999".split(
        b"|"
    ),
    *(b"!!python/object:os.system ", b"2026-02-30", b"{" * 300, b"[" * 3000, b"9" * 5000),
    *("\ufeff".encode(), "\u202e".encode(), b"\xff\xfe", b"\xc3", b"\x80" * 9),
)


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """`whole` with one to three things wrong with it: a value of its JSON, or some of its bytes."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        ways = [_in_json, _in_json, _in_bytes, _with_a_piece]
        whole = chance.choice(ways)(whole, chance)
    return whole


def _in_bytes(whole: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.choices(range(len(whole) + 1), k=2))
    last = min(last, first + chance.choice([1, 8, 200]))
    before, part, behind = whole[:first], whole[first:last], whole[last:]
    ways = [before, before + behind, before + part + part + behind, behind]
    flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in part)
    return chance.choice([*ways, before + flipped + behind, before + flipped + behind])


def _with_a_piece(whole: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(whole) + 1)
    return whole[:place] + chance.choice(PIECES) + whole[place + chance.choice([0, 0, 1, 5]) :]


def _in_json(whole: bytes, chance: random.Random) -> bytes:
    """One value changed, of a JSON text, a line of one, or the head of a safetensors file."""
    length = int.from_bytes(whole[:8], "little")
    if 0 < length <= len(whole) - 8:
        head = _in_json(whole[8 : 8 + length], chance)
        return len(head).to_bytes(8, "little") + head + whole[8 + length :]
    lines = whole.split(b"\n")
    place = chance.randrange(len(lines))
    for text, put in (
        (whole, lambda new: new),
        (lines[place], lambda new: b"\n".join([*lines[:place], new, *lines[place + 1 :]])),
    ):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        return put(json.dumps(_changed(found, chance)).encode())
    return _in_bytes(whole, chance)


def _changed(value: Any, chance: random.Random) -> Any:
    """The value with something else at a place in it, none there, or more."""
    if isinstance(value, str) and value[:1] in ("{", "[") and chance.random() < 0.8:
        try:  # JSON within a text, as in the metadata of statistics
            return json.dumps(_changed(json.loads(value), chance))
        except ValueError:
            return chance.choice(VALUES)
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.1:
        return chance.choice(VALUES)
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    new = dict(value) if isinstance(value, dict) else list(value)
    what = chance.random()
    if what < 0.7:
        new[key] = _changed(value[key], chance)
    elif what < 0.85:
        del new[key]
    elif isinstance(new, list):
        new.append(value[key])
    else:
        new[chance.choice(["", "x", "\x1b", key.upper()])] = value[key]
    return new
