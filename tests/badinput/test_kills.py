"""A sample of `tests/kill_merge.py`, which does this two hundred times."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import kill_merge
import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 of POSIX")
@pytest.mark.slow
def test_a_destination_is_whole_or_absent_after_a_kill(tmp_path: Path) -> None:
    loop = kill_merge.Kills(tmp_path, random.Random(0))
    assert loop.run(10) == ""
    assert sum(count for what, count in loop.counts.items() if what.endswith(" killed")) == 10
