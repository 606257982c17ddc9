"""Tokens per second of `generate`: with a cache, without one, and of the base model, as ratios in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc

PROMPT, NEW, RUNS = 64, 96, 4


def seconds(ways: dict[str, Callable[[dict[str, Any]], Tensor]]) -> dict[str, float]:
    """The shortest time of each way, taken in turns: what else the machine does falls on all of them."""
    ids = torch.randint(3, 999, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(RUNS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            assert way({**given, **settings}).shape[1] == PROMPT + NEW
            if turn:  # the first one traces
                taken[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in taken.items()}


@pytest.mark.bench
@pytest.mark.parametrize("rule", ["lora", "mam", "prefix"])
def test_a_cache_is_worth_its_trace(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6
    )
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path)
    sizes = {"lora": {"r": 8}, "mam": {"l": 16, "r": 64}, "prefix": {"l": 16}}
    model = peftc.apply(rule, tmp_path, set=sizes[rule])
    found = seconds({
        "cached": lambda given: model.generate(**given),
        "anew": lambda given: model.generate(**given, use_cache=False),
        "plain": lambda given: base.generate(**given),
    })  # fmt: skip
    cached, anew, plain = found["cached"], found["anew"], found["plain"]
    with capsys.disabled():
        print(
            f"\n{rule}: {NEW / cached:.0f} tokens/s with a cache, {anew / cached:.1f} times those without, "
            f"{plain / cached:.2f} times those of the base with its cache"
        )
    assert anew / cached > 1.5
