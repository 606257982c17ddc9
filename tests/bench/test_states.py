"""What a switch between states costs: a BERT of 12 layers with LoRA on queries and values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import peftc


@pytest.mark.bench
def test_switching_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    BertModel(BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)).save_pretrained(
        tmp_path / "base"
    )
    model: Any = peftc.apply("lora", tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    model.add("de", tmp_path / "out")
    count = sum(parameter.requires_grad for parameter in model.parameters())

    def seconds() -> float:
        start = time.perf_counter()
        for name in ("de", "default") * 50:
            model.set_active(name)
        return (time.perf_counter() - start) / 100

    taken = min(seconds() for _ in range(5))
    print(f"\nset_active, {count} parameters a state, torch {torch.__version__}: {1e6 * taken:.0f} µs")
    assert taken < 1e-3
