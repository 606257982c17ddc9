"""What activation checkpointing saves, measured: `gradient_checkpointing=True` of an unmodified Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import peftc
from runtime.test_trainer import trainer

Load = Callable[..., Any]


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made during a call hold at once, from torch's own allocator events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight layers, its activations far larger than its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("deep")
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=512, **sizes)).save_pretrained(place)
    return place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_the_trainer_needs_a_fraction_of_the_memory(deep: Path, tmp_path: Path) -> None:
    """Eight layers of 256 tokens: less than 40 % of the peak, with the same losses and deltas bit for bit."""
    peaks, losses, deltas = [], [], []
    ids = torch.randint(3, 64, (8, 256), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    for name in (False, True):
        model = peftc.apply("mam", deep, set={"l": 3, "r": 8})
        run = trainer(
            model, tmp_path / str(name), "llama", gradient_checkpointing=name, max_steps=2, eval_strategy="no",
            save_strategy="no", gradient_accumulation_steps=1, per_device_train_batch_size=4,
        )  # fmt: skip
        run.train_dataset, run.data_collator = (
            data,
            lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
        )
        model.train()(**run.data_collator(data[:4]))  # traced before it is measured
        peaks.append(peak(run.train))
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        deltas.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    print(f"peak of a step: {peaks[0] / 2**20:.1f} MiB, with checkpointing {peaks[1] / 2**20:.1f} MiB")
    assert peaks[1] < 0.4 * peaks[0]
    assert losses[0] == losses[1]
    assert all(torch.equal(deltas[1][name], value) for name, value in deltas[0].items())
