"""Trains a tiny Llama in each of two processes: `accelerate launch two_trainers.py BASE OUT [SETTING=JSON...]`.

With Trainer, or with `sft=true` with TRL's SFTTrainer. The main process writes the losses to OUT/losses.json and the
deltas to OUT/delta.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from on_cpu import prepare

import peftc
from runtime.test_trainer import MAM, trainer


def run(base: Path, out: Path, processes: int, settings: dict[str, Any]) -> list[float]:
    """The losses of four steps of two accumulated batches of eight rows, all processes together."""
    model = peftc.apply("mam", base, set=MAM)
    size = {"per_device_train_batch_size": 8 // processes, "eval_strategy": "no", "save_strategy": "no"}
    if settings.pop("sft", False):
        from runtime.test_trl import sft

        runner = sft(model, out, **size, **settings)
    else:
        runner = trainer(model, out, "llama", ddp_find_unused_parameters=False, **size, **settings)
        runner.train()
    model.save_pretrained(out / "delta", is_main_process=runner.is_world_process_zero())
    losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    if runner.is_world_process_zero():
        (out / "losses.json").write_text(json.dumps(losses))
    runner.accelerator.wait_for_everyone()
    runner.accelerator.end_training()  # a process that leaves the group open may abort when it ends
    return losses


if __name__ == "__main__":
    on_cpu = prepare()
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    base, out, *words = sys.argv[1:]
    settings = {key: json.loads(value) for key, value in (word.split("=") for word in words)}
    run(Path(base), Path(out), 2, {"use_cpu": on_cpu and not sharded, **settings})
