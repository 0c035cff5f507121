"""Write docs/commands.md from the parser and the errors: `python docs/commands.py`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

from sage_hub import errors
from sage_hub.cli.parser import COMMANDS, make_parser
from sage_hub.settings import SETTINGS

PAGE = Path(__file__).with_name("commands.md")
HEAD = (
    "# Commands and exit statuses\n\n"
    "Made of the parser by `python docs/commands.py`; `sage-hub COMMAND --help` says the same. "
    "BASE, UNLEARNED and TARGET are each a Hub repo (`org/name`; a source also `org/name/folder` "
    "and `@revision`) or a folder. The options that are also settings of a `sage.yaml` are in "
    "[Settings](settings.md), by the commands that have them.\n"
)
STATUSES = (
    "## Exit statuses\n\n"
    "An error is one sentence on stderr, and the status says which kind it is of. On 21, 24, 25 "
    "and 26 another try can help; on all others something has to change.\n\n"
    "| status | error | meaning |\n|---|---|---|\n| 0 | | Done. |\n"
)


def page() -> str:
    """The whole page."""
    parsers = make_parser()[1]
    parts = [HEAD, *(_command(name, parsers[name]) for name in COMMANDS), STATUSES + _statuses()]
    return "\n".join(parts)


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    usage, what, examples = COMMANDS[name].split("\n", maxsplit=2)
    shown = inspect.cleandoc(f"  {examples.lstrip()}")
    lines = [f"## sage-hub {name}", "", f"{what}", "", "```text", f"sage-hub {name} {usage}", "```"]
    rows = [row for action in parser._actions if (row := _row(action))]
    if rows:
        lines += ["", "| argument or option | meaning |", "|---|---|", *rows]
    settings = [one for one in SETTINGS.values() if name in one.commands]
    if settings:
        named = ", ".join(f"`{one.option}`" for one in settings)
        lines += ["", f"Settings: {named}."]
    return "\n".join([*lines, "", "```bash", shown, "```", ""])


def _row(action: argparse.Action) -> str | None:
    """A row for what is no setting; None for a setting and for --help."""
    if action.dest in ("help", *SETTINGS) or action.help is None:
        return None
    name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar}`"
    if action.option_strings and (action.metavar or action.choices):
        value = action.metavar or "|".join(map(str, action.choices or ()))
        name = f"`{action.option_strings[0]} {value}`".replace("|", r"\|")
    return f"| {name} | {action.help.replace('|', chr(92) + '|')} |"


def _statuses() -> str:
    def kinds(kind: type[errors.SageHubError]) -> Iterator[type[errors.SageHubError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from kinds(below)

    rows = []
    for kind in sorted(kinds(errors.SageHubError), key=lambda kind: kind.status):
        said = " ".join(inspect.getdoc(kind).split())  # type: ignore[union-attr]
        said = "Internal error, or a local file that cannot be read." if kind.status == 1 else said
        rows.append(f"| {kind.status} | `{kind.__name__}` | {said} |\n")
    return "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
