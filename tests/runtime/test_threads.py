"""Reading ahead: how far, in what order, and what happens to errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from sage_hub.runtime.threads import ahead


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_steps_ahead_than_wanted(depth: int) -> None:
    begun: list[int] = []

    def steps() -> Iterator[int]:
        for number in range(10):
            begun.append(number)
            yield number

    taken = 0
    with ahead(steps(), depth) as items:
        for number in items:
            assert number == taken
            taken += 1
            time.sleep(0.02)
            assert len(begun) <= taken + depth
    assert taken == 10


def test_the_next_step_is_made_while_this_one_is_worked_on() -> None:
    second = threading.Event()

    def steps() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    with ahead(steps(), 1) as items:
        next(iter(items))
        assert second.wait(timeout=5)


def test_an_error_arrives_in_its_place_and_the_generator_is_closed() -> None:
    closed = threading.Event()

    def steps() -> Iterator[int]:
        try:
            yield 1
            raise ValueError("two")
        finally:
            closed.set()

    found = []
    with pytest.raises(ValueError, match="two"), ahead(steps()) as items:
        found.extend(items)
    assert found == [1]
    assert closed.wait(timeout=5)


def test_who_leaves_early_stops_the_thread() -> None:
    closed = threading.Event()

    def steps() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with ahead(steps(), 1) as items:
        next(iter(items))
    assert closed.is_set()
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
