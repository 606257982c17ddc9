"""How long work tells where it is, without knowing who listens.

The driver names each step and counts what it can count; the command line turns that into bars on stderr.

    progress.step("fold")
    for done, tensor in enumerate(tensors):
        progress.update(done, len(tensors))
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Progress(Protocol):
    """What a driver function tells about its work."""

    def step(self, name: str) -> None:
        """A new step begins and the one before it has ended; `name` is what a user reads."""

    def update(self, done: int, total: int) -> None:
        """`done` of `total` parts of the current step are finished."""


class NullProgress:
    """A listener that says nothing."""

    __slots__ = ()

    def step(self, name: str) -> None:
        pass

    def update(self, done: int, total: int) -> None:
        pass


class RichProgress:
    """One bar for each step: a pulse until the step is counted, then how much of it is done."""

    __slots__ = ("_bars", "_task")

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def step(self, name: str) -> None:
        self.finish()
        self._task = self._bars.add_task(name, total=None)

    def update(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """Show the current step, if any, as done."""
        if self._task is None:
            return
        total = next(task.total for task in self._bars.tasks if task.id == self._task) or 1
        self._bars.update(self._task, completed=total, total=total)
        self._bars.stop_task(self._task)


@contextmanager
def terminal_progress(*, quiet: bool) -> Iterator[Progress]:
    """Bars on stderr while the block runs; nothing when `quiet` or when stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield NullProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        progress = RichProgress(bars)
        yield progress
        progress.finish()
