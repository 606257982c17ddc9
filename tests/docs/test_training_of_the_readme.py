"""The code under "Training" in the README runs as it stands, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime.tiny import MAKERS, batch

import peftc
from docs.blocks import ROOT, blocks


def test_code_under_training_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(1)
    MAKERS["llama"]().save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    line = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Training\n")[0].count("\n")
    code = next(block.text for block in blocks("README.md", "python") if block.line > line)
    given = batch(4)["input_ids"]
    names = {"data": [{"input_ids": row, "labels": row} for row in given]}
    for steps in (2, 3):
        few = code.replace("max_steps=1000", f"max_steps={steps}").replace(
            "save_steps=100", "save_steps=1, use_cpu=True"
        )
        few = few.replace(
            "save_steps=1,", "save_steps=1, disable_tqdm=True, report_to=[], dataloader_pin_memory=False,"
        )
        assert few.count("disable_tqdm") == 1
        exec(few, dict(names))
    assert peftc.last_checkpoint("runs") == "runs/checkpoint-3"
    stored = peftc.load("peftc-out").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in peftc.load("runs/checkpoint-3").state_dict().items())
