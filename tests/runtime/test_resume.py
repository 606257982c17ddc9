"""A run that is resumed in a new process goes on bit for bit; learning rates of a rule and their schedule as well."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from soak import contents, difference

import peftc
from runtime.test_trainer import collate, rows, trainer

Load = Callable[..., Any]
RATIO = 4.0


def ratioed(base: Path, out: Path, resume: str | None) -> Any:
    """LoRA+ with warm-up, a cosine and accumulated batches; six steps, a checkpoint every third."""
    model = peftc.load(resume, base) if resume else peftc.apply("loraplus", base, set={"ratio": RATIO, "r": 4})
    optimizer = torch.optim.AdamW(peftc.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    settings: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "eval_strategy": "no"}
    run = trainer(model, out, "llama", max_steps=6, save_steps=3, **settings)
    run.optimizer = optimizer
    run.train(resume_from_checkpoint=resume)
    return run


def main() -> None:
    """What the new process does: `python test_resume.py BASE OUT CHECKPOINT`."""
    base, out, resume = sys.argv[1:]
    ratioed(Path(base), Path(out), resume)


@pytest.mark.slow
def test_a_new_process_resumes_bit_for_bit(model_dir: Load, tmp_path: Path) -> None:
    """Deltas, optimizer, scheduler, random states and every logged loss of step 6, resumed from step 3."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    ratioed(model_dir("llama"), whole, None)
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    command = [sys.executable, "-m", "runtime.test_resume", model_dir("llama"), again, again / "checkpoint-3"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], timeout=300, capture_output=True)
    first, last = contents(whole / "checkpoint-6"), contents(again / "checkpoint-6")
    assert difference(first, last) == ""
    assert difference(first, contents(whole / "checkpoint-3")) == "/deltas/model.layers.0.self_attn.peftc.lora.q.A"
    assert len(first["state"]["log_history"]) == 6


def test_rates_of_a_rule_hold_along_a_schedule(model_dir: Load, tmp_path: Path) -> None:
    """Trainer with the rule's groups, a warm-up and a decay, against AdamW by hand with one rate for each tensor."""
    model = peftc.apply("loraplus", model_dir("llama"), set={"ratio": RATIO, "r": 4})
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 1, "max_grad_norm": 0.0}
    run = trainer(
        model, tmp_path, "llama", max_steps=3, gradient_accumulation_steps=1, train_sampling_strategy="sequential",
        eval_strategy="no", save_strategy="no", **settings,
    )  # fmt: skip
    run.optimizer = torch.optim.AdamW(peftc.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    run.train()
    found = {name: model.get_parameter(name).detach().clone() for name in start}
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name).copy_(value)
    one_each = [
        {"params": [model.get_parameter(name)], "lr": 1e-2 * (RATIO if name.endswith(".B") else 1.0)} for name in start
    ]
    optimizer = torch.optim.AdamW(one_each, weight_decay=0.1)
    full = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, share in enumerate((0.0, 1.0, 0.5)):
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        model(**collate(rows(16, "llama")[4 * step : 4 * step + 4])).loss.backward()
        optimizer.step()
    for name, value in found.items():
        torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, start[name])


if __name__ == "__main__":
    main()
