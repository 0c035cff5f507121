"""What a person watches while it runs: notes and progress bars, on stderr only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from tqdm import tqdm

from sage_hub.errors import printable

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Passed down explicitly; `Progress(quiet=True)` is silent and is what the Python API uses."""

    quiet: bool = True

    def note(self, text: str = "") -> None:
        """Print `text` to stderr, unless quiet."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    @contextmanager
    def counter(self, what: str, total: int, unit: str) -> Iterator[tqdm[NoReturn]]:
        """A bar to `update` by hand; it shows only on a terminal and leaves nothing behind."""
        # tqdm reads disable=None as "off when stderr is not a terminal".
        with tqdm(
            total=total,
            desc=printable(what),
            unit=unit,
            unit_scale=unit in ("B", "tok"),
            disable=True if self.quiet else None,
            leave=False,
            file=sys.stderr,
        ) as bar:
            yield bar

    def each(self, what: str, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
        """Yield `items`, one step of the bar each."""
        with self.counter(what, total, unit) as bar:
            for item in items:
                yield item
                bar.update()


def in_bytes(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def in_time(seconds: float) -> str:
    """A time as people write it, to two digits."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"


SILENT = Progress(quiet=True)


class Clock:
    """Seconds per stage, for the report."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap is that of `stage`."""
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now
