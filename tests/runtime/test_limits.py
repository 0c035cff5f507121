"""What came with a repo and is run, a template or a pattern, can neither hang a run nor fill it."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable

import pytest
from jinja2.sandbox import SandboxedEnvironment
from support.hostile import LOOP

from sage_hub.runtime import limits
from sage_hub.runtime.limits import TooMuchError, limited, text_of

DOUBLED = (
    "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    monkeypatch.setattr(limits, "TICK", 0.05)
    monkeypatch.setattr(limits, "ROOM", 200_000_000)


def written(template: str) -> Callable[[], str]:
    return lambda: SandboxedEnvironment().from_string(template).render()


@pytest.mark.parametrize(
    "work, why",
    [
        (written(LOOP), "runs for more than 0.2 s"),
        (written("{{ 9 ** (9 ** 9) }}"), "runs for more"),
        (written("{{ 'x' * 10 ** 11 }}"), "takes more than 200 MB of memory"),
        (written("{{ '%100000000000d' % 1 }}"), "takes more"),
        (written("{{ 'x' | center(10 ** 11) }}"), "takes more"),
        (written(DOUBLED), "more than"),
        (written("{{ 'x' * 10 ** 7 }}x"), "writes more than 10,000,000 letters"),
        (lambda: str(re.fullmatch("(x+)+y", "x" * 60)), "runs for more"),
    ],
)
def test_what_takes_too_much_is_stopped(work: Callable[[], str], why: str) -> None:
    begun = time.monotonic()
    with pytest.raises(TooMuchError, match=why):
        text_of(work)
    assert time.monotonic() - begun < 5


def test_all_is_as_before_afterwards() -> None:
    resource = pytest.importorskip("resource")

    def state() -> tuple[object, ...]:
        limit = resource.getrlimit(resource.RLIMIT_AS)
        return limit, signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)

    before = state()
    assert text_of(written("{{ 'x' * 3 }}")) == "xxx"
    assert state() == before
    with pytest.raises(TooMuchError):
        text_of(written(LOOP))
    assert state() == before
    with pytest.raises(ZeroDivisionError):
        text_of(written("{{ 1 / 0 }}"))
    assert state() == before


def test_a_process_that_waits_has_not_run() -> None:
    """It may have been stopped, or the machine be busy."""
    with limited():
        time.sleep(0.4)


def test_beside_the_main_thread_nothing_is_bounded_and_all_works() -> None:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(text_of(written("{{ 1 + 1 }}"))))
    thread.start()
    thread.join()
    assert said == ["2"]
