"""Reading ahead of a computation and writing behind it, a bounded number of steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

DEPTH = 2  # steps ahead or behind; more would cost memory and win nothing
_POLL = 0.1  # seconds after which a waiting thread looks whether the other one still lives


@contextmanager
def ahead(items: Iterable[T], depth: int = DEPTH) -> Generator[Iterable[T], None, None]:
    """Run the iterator `items` in a thread, `depth` steps ahead; its errors arrive in their place.

    No step is begun before one of the last `depth` was taken. When the block ends, however it
    ends, the thread has stopped and `items` is closed.
    """
    waiting: queue.Queue[tuple[T] | BaseException | None] = queue.Queue()
    free = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        steps = iter(items)
        try:
            while not stop.is_set():
                if free.acquire(timeout=_POLL):
                    waiting.put((next(steps),))
        except StopIteration:
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)
        finally:
            if isinstance(items, Generator):
                items.close()

    def arrived() -> Generator[T, None, None]:
        while (entry := waiting.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            free.release()
            yield entry[0]

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield arrived()
    finally:
        stop.set()
        thread.join()


class Behind(Generic[T]):
    """Call `consume` on each item in a thread, at most `depth` items behind the caller."""

    def __init__(self, consume: Callable[[T], None], depth: int = DEPTH) -> None:
        self._consume = consume
        self._waiting: queue.Queue[tuple[T] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand over `item`; raises what `consume` raised on an earlier one."""
        self._waiting.put((item,))
        if self._error is not None:
            raise self._error

    def finish(self, *, wait: bool) -> None:
        """Stop the thread, after the last item if `wait`; raises what `consume` raised."""
        if not wait:
            self._error = self._error or InterruptedError()  # the rest is dropped
        self._waiting.put(None)
        self._thread.join()
        if wait and self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # drained, so that the caller is never stuck on a full queue
            try:
                self._consume(entry[0])
            except BaseException as error:
                self._error = error
