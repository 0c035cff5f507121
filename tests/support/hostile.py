"""What a repo may hold to harm those who read it: texts that grow, or never end."""

from __future__ import annotations

# A template that is done after 10^10 rounds.
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# YAML of nine lines in which `*i` stands for 9^9 texts.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
