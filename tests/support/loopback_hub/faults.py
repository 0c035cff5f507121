"""What may go wrong with a request, told to the Hub beforehand."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from support.loopback_hub.messages import HubError

# What may happen to a request beside an error: the connection breaks off in the middle of a body,
# no answer comes for long, or none though the request was obeyed, half of the bytes come and are
# announced as all, or a wrong one comes.
Trouble = Literal["cut", "hang", "lost", "short", "wrong"]


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    happens: HubError | Trouble | Callable[[], object]
    times: int
    skip: int = 0  # requests that are let through before
    happened: bool = False

    def strikes(self, method: str, path: str) -> bool:
        """Whether it happens to this request; it happens so often, and then no more."""
        if not self.times or self.method != method or not self.path.search(path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        self.happened = True
        return True


class Faults:
    """Faults that lie in wait, each for the requests that match it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._faults: list[Fault] = []

    def fail(
        self,
        method: str,
        path_regex: str,
        status: int,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        skip: int = 0,
    ) -> None:
        """Answer the next requests that match, at either server, with this status.

        The expression is searched in the path as sent: percent-encoded and with its query.
        """
        error = HubError(status, f"injected fault {status}", headers=headers)
        self._faults.append(Fault(method, re.compile(path_regex), error, times, skip))

    def disturb(
        self,
        method: str,
        path_regex: str,
        what: Trouble | Callable[[], object],
        times: int = 1,
        skip: int = 0,
    ) -> None:
        """The same with a trouble, or with a function that is called before the answer."""
        self._faults.append(Fault(method, re.compile(path_regex), what, times, skip))

    @property
    def struck(self) -> int:
        """How many of the faults have happened."""
        return sum(fault.happened for fault in self._faults)

    def calm(self) -> None:
        """From now on nothing happens."""
        self._faults.clear()

    def raise_fault(self, method: str, path: str) -> None:
        with self.lock:
            for fault in self._faults:
                if not isinstance(fault.happens, str) and fault.strikes(method, path):
                    if isinstance(fault.happens, HubError):
                        raise fault.happens
                    fault.happens()

    def trouble_with(self, method: str, path: str) -> str | None:
        with self.lock:
            for fault in self._faults:
                if isinstance(fault.happens, str) and fault.strikes(method, path):
                    return fault.happens
        return None
