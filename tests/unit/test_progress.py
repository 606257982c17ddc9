"""Progress is told in steps and shown as bars, or not at all."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from peftc.progress import NullProgress, RichProgress, terminal_progress


def test_no_bars_where_stderr_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress(quiet=False) as progress:
        progress.step("trace")
        progress.update(1, 2)
    assert isinstance(progress, NullProgress)
    assert capsys.readouterr().err == ""


def test_a_new_step_finishes_the_one_before() -> None:
    with Progress(console=Console(file=io.StringIO())) as bars:
        progress = RichProgress(bars)
        progress.step("trace")
        progress.step("fold")
        progress.update(3, 12)
        trace, fold = bars.tasks
        assert trace.finished
        assert (fold.completed, fold.total, fold.finished) == (3, 12, False)


def test_update_before_any_step_is_harmless() -> None:
    with Progress(console=Console(file=io.StringIO())) as bars:
        RichProgress(bars).update(1, 2)
        assert not bars.tasks
