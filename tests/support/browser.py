"""A headless Chromium for tests of a page, or a reason why there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's browser of the Chromium that this machine has; skips where it has none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page was not looked at: no playwright (pip)"
    )
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("the page was not looked at: this machine has no Chromium")
    with playwright.sync_playwright() as driver:
        # The sandbox takes rights that containers and root do not have; the page is our own.
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()
