"""What is tried a few times always, and often once a week; what was tried is counted and told."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

SECRET = re.compile(r"hf_writer|hf_reader")  # the tokens of all runs in the tests


def seeds(few: int, many: int) -> list[Any]:
    """The seeds below `many`; those from `few` on are for the soak."""
    return [*range(few), *(pytest.param(n, marks=pytest.mark.soak) for n in range(few, many))]


def soak(*values: Any) -> Any:
    """A case for the soak alone."""
    return pytest.param(*values, marks=pytest.mark.soak)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where what runs within hangs."""

    def late(*_: Any) -> None:
        pytest.fail(f"no end after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


class Tally:
    """What one test tries: its cases by seed, and how each of them ended."""

    def __init__(self, only: int | None) -> None:
        self.ended: Counter[tuple[str, str, str]] = Counter()  # part, kind, ending
        self.seed: int | None = None  # of the case that is tried
        self._only = only

    def each(self, seeds: Iterable[int]) -> Iterator[int]:
        """One seed after the other, or the one of --seed alone."""
        for seed in seeds if self._only is None else [self._only]:
            self.seed = seed
            yield seed
        self.seed = None

    def count(self, part: str, kind: str, ending: str, times: int = 1) -> None:
        """A case of a `kind`, in one `part` of the table, has come to this `ending`."""
        self.ended[part, kind, ending] += times

    def told(self) -> dict[str, Any]:
        """As JSON will give it back."""
        return {"seed": self.seed, "ended": [[*key, n] for key, n in self.ended.items()]}


class Figures:
    """A plugin of pytest that adds up all tallies, from whichever process they come."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.ended: Counter[tuple[str, str, str]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.repeat: list[str] = []
        self.whole = True  # it was not stopped before its end
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        if report.when != "teardown":
            return
        told = dict(report.user_properties).get("tally", {"seed": None, "ended": []})
        for part, kind, ending, times in told["ended"]:
            self.ended[part, kind, ending] += times
        spent = self.seconds.pop(report.nodeid, 0.0)
        # All of a test is of one part, but for what is told of its phases.
        for part in [part for part, *_ in told["ended"] if not part.endswith("by phase")][:1]:
            self.seconds[part] += spent
        if report.nodeid in self._failed:
            only = "" if told["seed"] is None else f" --seed {told['seed']}"
            self.repeat.append(f"pytest -n 0 -m '' '{report.nodeid}'{only}")

    def pytest_keyboard_interrupt(self) -> None:
        self.whole = False

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.ended:
            terminalreporter.section("soak: what was tried, and how it ended")
            terminalreporter.write_line(table(self.ended))
        if self.repeat:
            terminalreporter.section("each failure again")
            terminalreporter.write_line("\n".join(self.repeat))
        if self.file is not None:
            Path(self.file).write_text(json.dumps(self.told(), indent=1, ensure_ascii=False) + "\n")

    def told(self) -> dict[str, Any]:
        """What docs/reliability.py makes its table of."""
        return {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": _machine(),
            "python": platform.python_version(),
            "whole": self.whole,
            "failures": len(self.repeat),
            "seconds": {part: round(self.seconds[part]) for part, _, _ in self.ended},
            "ended": [[*key, times] for key, times in sorted(self.ended.items())],
        }


def table(ended: Counter[tuple[str, str, str]]) -> str:
    """The endings of each kind in one line, under its part."""
    lines = []
    for part in dict.fromkeys(part for part, _, _ in ended):
        own = {key: times for key, times in ended.items() if key[0] == part}
        lines.append(f"{part}: {sum(own.values()):,}")
        for kind in dict.fromkeys(kind for _, kind, _ in own):
            endings = {key[2]: times for key, times in own.items() if key[1] == kind}
            said = ", ".join(f"{times:,} {ending}" for ending, times in sorted(endings.items()))
            lines.append(f"  {kind}: {said}")
    return "\n".join(lines)


def _machine() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    found = re.search(r"model name\s*: (.+)", told)
    wide = ", AVX-512" * ("avx512f" in told)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores{wide}"
