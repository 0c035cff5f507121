"""The docs say what is so: each command in them can be typed, and what is generated is as made."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sage_hub.cli import parser
from sage_hub.record.gates import parse as parse_gate
from sage_hub.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "SKILL.md", ROOT / "README.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def typed(page: Path) -> Iterator[list[str]]:
    """The words of each sage-hub command that a page has people type."""
    for block in blocks(page, "bash"):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            if found := re.search(r"(?<!\[)\b(?:sage-hub|hf sage) (?!@)(.+)", line):
                yield words_of(found[1])


def words_of(text: str) -> list[str]:
    """The words of a command, up to where the shell does something else."""
    if text.count("'") % 2 or text.count('"') % 2:
        text = text.rstrip("'\"")  # the command was in quotes itself
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("();<>|&"):
            return words[:-1] if word[0] == ">" and words[-1] == "2" else words
        words.append(word)
    return words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_command_of_a_page_can_be_typed(page: Path) -> None:
    for words in typed(page):
        assert parser.parse(words).command == words[0], words


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_commands_are_found_at_all() -> None:
    """So that the test above does not pass by finding none."""
    found = {name_of(page): len([*typed(page)]) for page in PAGES}
    assert found["docs/tutorial.md"] >= 9
    assert all(found[f"docs/how-to/{name}.md"] for name in ("adapters", "without-rows"))
    assert sum(found.values()) > 50


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_option_that_a_page_speaks_of_is_one(page: Path) -> None:
    commands = parser.make_parser()[1]
    known = {
        option for one in commands.values() for a in one._actions for option in a.option_strings
    }
    known |= {"--version", "--print-completion"}
    for code in re.findall(r"`(sage-hub [^`\n]*)`", page.read_text(encoding="utf-8")):
        words = code.split()[1:]
        assert words[0] in commands or words[0] in known or not words[0].islower(), code
        for word in words:
            option = word.strip("[](),;.").partition("=")[0]
            assert not option.startswith("--") or option in known, code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_settings_file_of_a_page_is_taken(page: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if isinstance(values, dict) and values.keys() <= Settings.__dataclass_fields__.keys():
            for gate in Settings(**values).gates:
                parse_gate(gate)


NOTEBOOK = ROOT / "docs" / "examples" / "repair.ipynb"


def test_the_notebook_is_as_nobody_has_run_it_and_its_commands_can_be_typed() -> None:
    """What CI runs from top to bottom, by .ci/notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert "%pip install" in codes[0]
    commands = re.findall(r"^ *!sage-hub (.+)$", "\n".join(codes), re.MULTILINE)
    assert [parser.parse(words_of(command)).command for command in commands] == ["demo", "verify"]
    for one in codes:  # the rest is Python
        compile(re.sub(r"^( *)[!%].*$", r"\1pass", one, flags=re.MULTILINE), "cell", "exec")
    (gates,) = re.findall(r"gates=(\[.*?\])", "\n".join(codes))
    for gate in ast.literal_eval(gates):
        parse_gate(gate)
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "- run: bash .ci/notebook" in ci
    assert NOTEBOOK.name in (ROOT / ".ci" / "notebook").read_text(encoding="utf-8")


def test_the_page_of_commands_is_what_the_parser_gives() -> None:
    """If not, `python docs/commands.py` makes it."""
    made = runpy.run_path(str(ROOT / "docs" / "commands.py"))
    assert made["page"]() == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def test_the_site_has_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(nav: object) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        for one in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
            yield from pages(one)

    docs = ROOT / "docs"
    assert sorted(pages(config["nav"])) == sorted(
        page.relative_to(docs).as_posix() for page in docs.rglob("*.md")
    )


def test_the_figures_of_the_soak_are_those_that_it_wrote() -> None:
    """If not, `python docs/reliability.py` makes them of docs/reliability.json."""
    made = runpy.run_path(str(ROOT / "docs" / "reliability.py"))
    text = made["PAGE"].read_text(encoding="utf-8")
    figures = json.loads(made["KEPT"].read_text(encoding="utf-8"))
    assert text == made["page"](text, figures)
    part, *_ = figures["ended"][0]
    figures["ended"].append([part, "another kind", "ended", 7])
    assert "| another kind | 7 | 7 ended |" in made["page"](text, made["together"]([figures]))
