"""The page as a person has it: in a browser, narrow and wide, with texts that mean harm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import browser
from support.pico import proxies

from sage_hub.cli.main import main

HOSTILE = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"
RIGHT_TO_LEFT = "\u202eחתול \u202eevil"
LONG = "x" * 10_000
SIDES = ("base", "unlearned", "sanitized")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(chromium: Any, _pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a release, with rows of every kind of hostility among its answers."""
    out = tmp_path_factory.mktemp("page") / "out"
    both = [str(_pair / "base"), str(_pair / "unlearned"), "--output", str(out), "--quiet"]
    assert main(["sanitize", *both, *proxies(_pair), "--generate-rows", "3"]) == 0
    rows = [
        ("row 90", HOSTILE, HOSTILE, [0.9, 0.1, 0.8]),
        ("row 91", RIGHT_TO_LEFT, RIGHT_TO_LEFT, [0.9, 0.5, 0.1]),
        ("row 92", LONG, LONG, [0.9, 0.2, 0.3]),
        ("row 93", "Where was she born?", "In Upper Oskwell.", [0.9, 0.01, 0.99]),
    ]
    with out.with_name("out.answers.jsonl").open("a") as file:
        for place, question, said, known in rows:
            made = {
                side: {"probability": value, "said": said}
                for side, value in zip(SIDES, known, strict=True)
            }
            made["unlearned"]["said"] = "In Lower Oskwell"
            row = {"set": "forget", "row": place, "question": question, "wanted": said}
            file.write(json.dumps(row | {"models": made}) + "\n")
    attack(out / "sage" / "report.json")
    assert main(["review", str(out), "--no-open", "--quiet"]) == 0
    return out.with_name("out.review.html")


def attack(path: Path) -> None:
    """Put a curve of relearning into a report."""
    report = json.loads(path.read_text(encoding="utf-8"))
    (one,) = (
        result
        for result in report["results"]
        if (result["model"], result["set"], result["metric"]) == ("base", "forget", "probability")
    )
    for model, start in (("base", 0.9), ("unlearned", 0.1), ("sanitized", 0.05)):
        for steps in (0, 10, 25, 50, 100) if model != "base" else (0,):
            value = {"value": start + steps / 500, "interval": [start, start + steps / 250]}
            about = {"model": model, "condition": f"relearned_{steps}"}
            report["results"].append({**one, **about, **value})
    path.write_text(json.dumps(report), encoding="utf-8")


@pytest.fixture
def shown(chromium: Any, page_file: Path) -> Iterator[Open]:
    """Opens the page, and holds in the end that nothing went wrong and nothing was fetched."""
    wrong: list[str] = []
    contexts = []

    def open_page(**how: Any) -> Any:
        contexts.append(chromium.new_context(**how))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else 0)
        page.on("request", lambda r: wrong.append(r.url) if r.url != page_file.as_uri() else 0)
        page.goto(page_file.as_uri())
        page.wait_for_selector("article")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def places(page: Any) -> list[str]:
    return [text.rpartition(", ")[2] for text in page.locator("article h3").all_inner_texts()]


def settle(page: Any, rows: int, text: str = "") -> None:
    """Wait until so many rows are shown, with `text` in the first of them."""
    from playwright.sync_api import expect

    expect(page.locator("article")).to_have_count(rows)
    expect(page.locator("article").first).to_contain_text(text)


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (800, "light"), (1400, "dark")])
def test_it_loads_at_every_width_and_in_both_schemes(shown: Open, width: int, scheme: str) -> None:
    page = shown(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for part in ("verdict", "pictures", "answers", "figures", "record"):
        assert page.locator(f"section#{part}").count() == 1
    page.wait_for_selector("figure svg")
    assert page.locator("figure.picture").count() >= 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "out – sage-hub"


def test_answers_are_read_before_pictures_are_looked_at(shown: Open) -> None:
    page = shown()
    order = page.locator("main > section").evaluate_all("all => all.map((one) => one.id)")
    assert order[:4] == ["verdict", "answers", "pictures", "figures"]
    assert order[-1] == "record"
    said = page.inner_text("#answers")
    assert "known: how likely the model finds the wanted answer" in said
    told = page.locator("article header span[title]").first
    assert told.inner_text().startswith("known ")
    assert told.get_attribute("title").startswith("How likely the model finds the wanted answer")


def test_it_opens_with_what_is_back_and_says_how_to_read_on(shown: Open) -> None:
    page = shown()
    assert page.input_value("#set") == "forget"
    assert places(page)[:2] == ["row 93", "row 90"]
    first, second = (page.locator(".ways button").nth(place) for place in (0, 1))
    assert first.get_attribute("aria-pressed") == "true"
    assert "again as the base's is a leak" in page.inner_text(".hint")
    second.click()
    assert [one.get_attribute("aria-pressed") for one in (first, second)] == ["false", "true"]
    assert page.input_value("#set") == "heldout"
    assert "is still lost most" in page.input_value("#order")
    assert "only style" in page.inner_text(".hint")
    page.select_option("#set", "")
    assert second.get_attribute("aria-pressed") == "false"
    assert not page.locator(".hint").is_visible()


def test_the_curve_of_relearning_is_a_picture_of_its_own(shown: Open) -> None:
    page = shown(viewport={"width": 800, "height": 900})
    curve = page.locator("figure.picture", has_text="Taught some of it again")
    curve.locator("svg").wait_for()
    assert curve.locator("svg [aria-label='dot']").locator("path, circle").count() == 10
    curve.locator("summary").click()
    said = curve.locator("table").inner_text()
    assert "100 steps" in said
    assert "sanitized" in said
    assert "0.250 [0.0500, 0.450]" in said


def test_search_filter_and_order(shown: Open) -> None:
    page = shown()
    page.select_option("#set", "")
    page.select_option("#order", label="as in the set")
    everything = page.locator("article").count()
    page.fill("#search", "OSKWELL born")
    settle(page, 1, "row 93")
    assert places(page) == ["row 93"]
    assert page.inner_text("#count").startswith("1 of ")
    assert page.locator("article mark").all_inner_texts()[:1] == ["Lower"]
    page.fill("#search", "")
    settle(page, everything)

    page.select_option("#set", "forget")
    sets = {text.partition(",")[0] for text in page.locator("article h3").all_inner_texts()}
    assert sets == {"forget"}
    page.select_option("#order", label="what came back most (release − unlearned)")
    assert places(page)[:2] == ["row 93", "row 90"]
    page.select_option("#order", label="what came back least")
    assert places(page)[0] == "row 91"
    page.select_option("#order", label="what is still lost most (base − release)")
    assert places(page)[0] == "row 91"

    page.uncheck("#answered")
    page.select_option("#set", "")
    shown_now = page.locator("article").count()
    page.click("#more")
    assert page.locator("article").count() > shown_now


def test_hostile_answers_are_shown_as_what_they_are(shown: Open) -> None:
    page = shown(viewport={"width": 360, "height": 800})
    page.fill("#search", "harmed")
    settle(page, 1, HOSTILE)
    assert HOSTILE in page.inner_text("article")
    assert page.evaluate("window.harmed") is None
    assert page.locator("img, iframe, object, embed").count() == 0
    for text in ("evil", "xxxxxxxx"):
        page.fill("#search", text)
        settle(page, 1, text)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("article .side .text").first.bounding_box()
    assert box["height"] <= 400  # 10,000 characters are scrolled, not laid out


def test_the_browser_itself_would_refuse_harm(chromium: Any, page_file: Path) -> None:
    page = chromium.new_page()
    page.goto(page_file.as_uri())
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.harmed = 3';"
        " document.body.append(s); }"
    )
    assert page.evaluate("window.harmed") is None
    asked = "() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))"
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    assert "TypeError" in page.evaluate(asked)
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_it_can_be_worked_by_keys_alone(shown: Open) -> None:
    page = shown()
    page.focus("#search")
    page.keyboard.type("Oskwell")
    settle(page, 4)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "set"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "order"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "answered"
    assert page.locator("label:has(#search)").inner_text().startswith("Search")


def test_a_figure_tells_its_numbers_when_pointed_at_and_in_a_table(shown: Open) -> None:
    page = shown(viewport={"width": 1400, "height": 900})
    page.wait_for_selector("figure svg")
    first = page.locator("figure.picture").first
    dot = first.locator("svg [aria-label='dot'] path, svg [aria-label='dot'] circle").last
    dot.scroll_into_view_if_needed()  # a pointer reaches nothing outside of the window
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = first.locator("[aria-label='tip'] text")
    tip.wait_for()
    assert "forget" in tip.text_content()
    first.locator("summary").click()
    assert "sanitized" in first.locator("table").inner_text()
