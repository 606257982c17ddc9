"""The newest whole checkpoint of a run that may have been killed at any moment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from soak import difference

import peftc
from peftc.runtime.delta_dir import DeltaDir
from runtime.tiny import moved

SOAK = Path(__file__).parents[1] / "soak.py"
ORDER = ["peftc.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
"""Files of a checkpoint, in the order in which the Trainer writes them; the deltas are before peftc.json."""


@pytest.fixture
def runs(adapted: Callable[..., Any], tmp_path: Path) -> Path:
    """What the Trainer leaves after four steps, a checkpoint every other one."""
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()  # as the Trainer does before it saves
        adapted("bert").save_pretrained(folder)
        for name in ORDER[1:-1]:
            torch.save({"step": torch.tensor(step)}, folder / name)
        (folder / ORDER[-1]).write_text(json.dumps({"global_step": step}))
    (tmp_path / "runs").mkdir()  # what is no checkpoint is passed over
    (tmp_path / "checkpoint-x").write_text("")
    return tmp_path


def test_newest_is_by_step_and_none_where_there_is_none(runs: Path) -> None:
    assert peftc.last_checkpoint(runs) == str(runs / "checkpoint-4")
    (runs / "checkpoint-4").rename(runs / "checkpoint-10")
    (runs / "checkpoint-10" / ORDER[-1]).write_text('{"global_step": 10}')
    assert peftc.last_checkpoint(str(runs)) == str(runs / "checkpoint-10")
    assert peftc.last_checkpoint(runs / "runs") is None
    assert peftc.last_checkpoint(runs / "nowhere") is None


@pytest.mark.parametrize("written", range(len(ORDER)))
def test_a_checkpoint_whose_save_was_killed_is_passed_over(runs: Path, written: int) -> None:
    """transformers' own choice is the half-written one."""
    from transformers.trainer_utils import get_last_checkpoint

    for name in ORDER[written:]:
        (runs / "checkpoint-4" / name).unlink()
    (runs / "checkpoint-x").unlink()
    assert peftc.last_checkpoint(runs) == str(runs / "checkpoint-2")
    assert get_last_checkpoint(str(runs)) == str(runs / "checkpoint-4")


@pytest.mark.parametrize("name", ["delta.safetensors", *ORDER])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(runs: Path, name: str) -> None:
    file = runs / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-3])
    assert peftc.last_checkpoint(runs) == str(runs / "checkpoint-2")


def test_the_state_of_another_step_is_not_whole(runs: Path) -> None:
    shutil.copy(runs / "checkpoint-2" / ORDER[-1], runs / "checkpoint-4" / ORDER[-1])
    assert peftc.last_checkpoint(runs) == str(runs / "checkpoint-2")


REPLACE = Path.replace


def replacing(count: int) -> Callable[[Path, Path], Path]:
    """`Path.replace` that stops the program after so many files."""
    left = iter(range(count))

    def replace(file: Path, goal: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return REPLACE(file, goal)

    return replace


def test_a_save_killed_over_an_older_one_leaves_one_of_the_two(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are put into place one by one; wherever that stops, the deltas that open are all old or all new."""
    model, place = peftc.apply("lora", model_dir("bert")), tmp_path / "checkpoint-2"
    place.mkdir()
    model.save_pretrained(place)
    files, found = len(list(place.iterdir())), []
    for count in range(files):
        old = DeltaDir.open(place).tensors()
        moved(model)
        monkeypatch.setattr(Path, "replace", replacing(count))
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(place)
        opened = DeltaDir.open(place).tensors()
        new = {name: model.get_parameter(name).detach() for name in opened}
        found.append((not difference(opened, old), not difference(opened, new)))
    assert files == 5
    assert all(is_old != is_new for is_old, is_new in found)
    assert {True, False} == {is_new for _, is_new in found}


def test_the_soak_sees_a_bit_that_differs() -> None:
    one = {"deltas": {"A": torch.zeros(3)}, "random": [(1, 2.0)], "state": {"loss": 0.1}}
    other = {"deltas": {"A": torch.tensor([0.0, 0.0, 1e-45])}, "random": [(1, 2.5)], "state": {"loss": 0.1}}
    assert difference(one, one) == ""
    assert difference(one, other) == "/deltas/A"
    assert difference(one, {**other, "deltas": one["deltas"]}) == "/random/0/1"
    assert difference(one, {**one, "state": {}}) == "/state"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_nothing_is_lost_when_a_run_is_killed_again_and_again() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", SOAK, "1"], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.endswith("nothing lost or corrupt\n")
    for phase in ("in training", "in a save"):
        assert f" killed {phase}\n" in result.stdout
