"""Write what follows from the declarations in sage_hub/settings.py: `python docs/settings.py`.

That is the tables in docs/settings.md, and the JSON Schema of sage.yaml in the package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import sage_hub
from sage_hub.cli.parser import make_parser
from sage_hub.settings import SETTINGS, Setting

PAGE = Path(__file__).with_name("settings.md")
SCHEMA = Path(sage_hub.__file__).with_name("data") / "sage.schema.json"
MADE = re.compile(r"(<!-- (.+): made by docs/settings.py -->\n\n)(\|.*\n)*")


def page(text: str) -> str:
    """docs/settings.md with its tables made anew."""
    return MADE.sub(lambda found: f"{found[1]}{_table(found[2])}", text)


def _table(group: str) -> str:
    head = "| option | in `sage.yaml` | values | default | meaning | commands |"
    rows = [_row(setting) for setting in SETTINGS.values() if setting.group == group]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, ""])


def _row(setting: Setting) -> str:
    commands = [name for name, parser in make_parser()[1].items() if _has(parser, setting)]
    option = f"{setting.option} {setting.kind.metavar}".rstrip()
    default = setting.default_words or "none"
    cells = (setting.kind.wanted, default, setting.help, ", ".join(commands))
    option = option.replace("|", r"\|")  # it would end the cell
    return f"| `{option}` | `{setting.name}` | {' | '.join(cells)} |"


def _has(parser: Any, setting: Setting) -> bool:
    return any(action.dest == setting.name for action in parser._actions)


def schema() -> dict[str, Any]:
    """The JSON Schema of sage.yaml."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sage.yaml, the settings of sage-hub",
        "description": "docs/settings.md says more of each.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {name: _property(setting) for name, setting in SETTINGS.items()},
    }


def _property(setting: Setting) -> dict[str, Any]:
    said = f" (default: {setting.default_words})" if setting.default_words else ""
    about: dict[str, Any] = {"description": f"{setting.help}{said}"}
    if setting.default is None:
        return about | {"anyOf": [setting.kind.schema, {"type": "null"}]}
    return about | {"default": setting.default} | setting.kind.schema


def schema_text() -> str:
    """sage_hub/data/sage.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
