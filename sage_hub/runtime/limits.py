"""What a program that came with a repo may take: a template's or a pattern's time and memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from sage_hub.runtime.progress import in_bytes

SECONDS = 10.0  # of this thread on a CPU, where a template takes milliseconds for a text
ROOM = 2 << 30  # bytes of memory, beside what the process has
LONGEST = 10_000_000  # letters of a text that a template writes
TICK = 0.2  # seconds between two looks


class TooMuchError(ValueError):
    """What it takes too much of, as "it …"; to be told with the file that it is in."""


class _Stop(BaseException):
    """The time is over: none that a library takes for a failure of its own, and goes on."""


def text_of(render: Callable[[], str]) -> str:
    """What `render`, a template's, writes. Raises TooMuchError."""
    with limited():
        text = render()
    if len(text) > LONGEST:
        raise TooMuchError(f"it writes more than {LONGEST:,} letters")
    return text


@contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Raise TooMuchError where what runs within takes more than `seconds`, or ROOM of memory.

    SECONDS, if nothing else is said.

    The time is bounded on Unix, the memory on Linux, both in the main thread, where each command
    does its work: nothing else can be interrupted from within a process.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        yield
        return
    with _memory(ROOM), _time(SECONDS if seconds is None else seconds):
        yield


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    # The timer is of the clock, the measure is not: a process that was stopped, or had to wait for
    # a busy machine, has not run.
    begun, running = time.thread_time(), True

    def look(number: int, frame: FrameType | None) -> None:
        if running and time.thread_time() - begun > seconds:
            raise _Stop

    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        yield
    except _Stop:
        raise TooMuchError(f"it runs for more than {seconds:g} s") from None
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _memory(room: int) -> Iterator[None]:
    taken = _address_space()
    if taken is None:
        yield
        return
    import resource  # here, as there is none on Windows

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    known = [taken + room, *(limit for limit in (before, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    try:
        yield
    except MemoryError:
        raise TooMuchError(f"it takes more than {in_bytes(room)} of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def _address_space() -> int | None:
    """Bytes of addresses that this process has; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None
