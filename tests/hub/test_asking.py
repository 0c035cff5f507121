"""What is asked of the Hub again, how often, and what is final."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from support.loopback_hub import LoopbackHub

from sage_hub.errors import NetworkError, SageHubError
from sage_hub.hub import client as asking
from sage_hub.hub.client import ask


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    naps: list[float] = []
    monkeypatch.setattr(asking.time, "sleep", naps.append)
    return naps


def test_a_server_error_is_asked_about_again(hub: LoopbackHub, naps: list[float]) -> None:
    hub.add_repo("org/x", {"a": b"a"})
    for status in (429, 500, 502, 503, 504, 408):
        hub.fail("GET", "/api/models/org/x", status)
    assert ask("org/x", lambda: HfApi().model_info("org/x")).sha
    assert naps == [0.01] * 6


def test_up_to_a_limit_that_is_said(hub: LoopbackHub, naps: list[float]) -> None:
    hub.add_repo("org/x", {"a": b"a"})
    hub.fail("GET", "/api/models/org/x", 503, times=100)
    with pytest.raises(NetworkError, match="answered 503 about org/x, 7 times in 0 s"):
        ask("org/x", lambda: HfApi().model_info("org/x"))
    assert len(naps) == len(asking.WAITS)


def test_the_hub_says_when_to_come_back(hub: LoopbackHub, naps: list[float]) -> None:
    hub.add_repo("org/x", {"a": b"a"})
    hub.fail("GET", "/api/models/org/x", 429, headers={"Retry-After": "7"})
    limit = {"RateLimit": '"api";r=0;t=55'}
    hub.fail("GET", "/api/models/org/x", 429, headers=limit)
    date = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    hub.fail("GET", "/api/models/org/x", 503, headers=date)
    assert ask("org/x", lambda: HfApi().model_info("org/x")).sha
    assert naps == [7, 55, 0.01]
    hub.fail("GET", "/api/models/org/x", 429, headers={"Retry-After": "86400"})
    with pytest.raises(NetworkError, match="asks to wait 86400 s"):
        ask("org/x", lambda: HfApi().model_info("org/x"))
    assert len(naps) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 501])
def test_a_refusal_is_final(status: int, hub: LoopbackHub, naps: list[float]) -> None:
    hub.add_repo("org/x", {"a": b"a"})
    hub.fail("GET", "/api/models/org/x", status, times=100)
    with pytest.raises(SageHubError, match=str(status)):
        ask("org/x", lambda: HfApi().model_info("org/x"))
    assert naps == []


def test_nobody_there(naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi(endpoint="http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"org/x cannot be reached: no connection .* 7 times"):
        ask("org/x", lambda: api.model_info("org/x"))
    assert len(naps) == len(asking.WAITS)


def test_nobody_there_before_any_work_is_known_in_seconds(
    naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "WAITS", (1, 2, 4, 8, 16, 30))
    clock = SimpleNamespace(sleep=naps.append, monotonic=lambda: float(sum(naps)))
    monkeypatch.setattr(asking, "time", clock)
    api = HfApi(endpoint="http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="3 times in 3 s"):
        ask("org/x", lambda: api.model_info("org/x"), first=True)
    assert naps == [1, 2]


def test_one_who_answers_is_waited_for_also_at_first(
    hub: LoopbackHub, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "WAITS", (1, 2, 4, 8, 16, 30))
    hub.add_repo("org/x", {"a": b"a"})
    hub.fail("GET", "/api/models/org/x", 503, times=6)
    assert ask("org/x", lambda: HfApi().model_info("org/x"), first=True).sha
    assert naps == [1, 2, 4, 8, 16, 30]
