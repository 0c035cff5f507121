"""What GitHub's runner reads of a job: its outputs, and the text behind Markdown."""

from __future__ import annotations

import re


def read_outputs(text: str) -> dict[str, str]:
    """What the runner reads from GITHUB_OUTPUT: `name=value` and `name<<END … END`."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        if heredoc := re.fullmatch(r"([^=<]+)<<(.+)", line):
            value = []
            while (part := next(lines)) != heredoc[2]:
                value.append(part)
            found[heredoc[1]] = "\n".join(value)
        else:
            name, equals, rest = line.partition("=")
            assert equals, line
            found[name] = rest
    return found


def literal(cell: str) -> str:
    return re.sub(r"\\(.)", r"\1", cell)
