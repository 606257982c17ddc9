"""One thread that does what it is given, in order, a few items behind the one that gives: hashing and writing while
the next tensor is computed.

    with Worker() as worker:
        worker.do(file.write, block)      # `block` must stay as it is until then
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Worker:
    """At most `ahead` items wait, so that what they hold in memory is bounded. An error in one is raised by a later
    `do`, or by `finish`; leaving the block finishes, or, when it ends in an error, drops what has not begun."""

    def __init__(self, ahead: int = 6) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._ahead = ahead
        self._waiting: deque[Future[Any]] = deque()

    def do(self, function: Callable[..., object], *arguments: object) -> None:
        """Have `function(*arguments)` done after everything that was given before."""
        while len(self._waiting) >= self._ahead:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait until everything is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
