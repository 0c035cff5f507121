"""The page's Python side: what goes in, how it is escaped, and that it can load nothing."""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_hub.record.page import SCRIPTS, escaped, page_of

DATA = Path(__file__).parents[2] / "sage_hub" / "data" / "review"


def content_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    return json.loads(text)


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_whatever_the_text_it_ends_no_script_and_comes_back(content: Any) -> None:
    text = escaped(content)
    assert not set(text) & set("<>&\u2028\u2029")
    assert text.isascii()
    assert json.loads(text) == content


@pytest.mark.parametrize(
    "said",
    ["</script><script>alert(1)</script>", "<!--<script>", "\u2028", "\ud800", "{content}", "]]>"],
)
def test_a_hostile_text_is_content_and_nothing_else(said: str) -> None:
    page = page_of({"title": said})
    page.encode()  # also half a pair of surrogates
    assert content_of(page) == {"title": said}
    assert page.count("<script") == 1 + len(SCRIPTS) + inner_scripts()
    assert page.count("</script") == 1 + len(SCRIPTS)


def inner_scripts() -> int:
    """How often the libraries write the word themselves."""
    return sum((DATA / name).read_text(encoding="utf-8").count("<script") for name in SCRIPTS)


def test_it_may_load_nothing_and_run_its_own_scripts_alone() -> None:
    page = page_of({"title": "x"})
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in html.unescape(policy).split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules.keys() <= {
        *("default-src", "script-src", "style-src", "img-src", "base-uri", "form-action")
    }
    assert "unsafe" not in rules["script-src"]
    assert len(rules["script-src"].split()) == len(SCRIPTS)


def test_our_own_part_names_no_address() -> None:
    page = page_of({"title": "x"})
    for name in ("d3.min.js", "plot.min.js"):
        page = page.replace((DATA / name).read_text(encoding="utf-8"), "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=|href=\"", page)
    for name in ("pictures.js", "review.js"):
        ours = (DATA / name).read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", ours)


def test_the_libraries_are_those_that_the_licence_note_names() -> None:
    note = (DATA / "LICENCES.md").read_text(encoding="utf-8")
    for name in ("d3.min.js", "plot.min.js"):
        sha256 = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
        assert f"`{name}`" in note
        assert sha256 in note
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 600_000
