"""What states cost: a switch between them, rows of several, a mixture; and what a quantized base saves."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

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


@pytest.mark.bench
def test_rows_and_mixtures_cost_little_beside_a_call(tmp_path: Path) -> None:
    """A call of 8 rows of 64 tokens: by one state, by rows of four, by a mixture of two; and entering such a block."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model: Any = peftc.apply("lora", tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    for name in ("de", "fr"):
        model.add(name, tmp_path / "out")
    inputs = {"input_ids": torch.randint(0, 1000, (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.long)}

    def seconds(block: Any, call: Any) -> float:
        taken = []
        for _ in range(6):  # the first call traces
            with block():
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        return min(taken)

    def call() -> None:
        with torch.no_grad():
            model(**inputs)

    rows: list[str | None] = ["de", "fr", "default", None] * 2
    blocks = {
        "one state": nullcontext,
        "rows of four": lambda: model.per_sample(rows),
        "a mixture of two": lambda: model.mix({"de": 0.7, "fr": 0.3}),
    }
    found = {name: seconds(block, call) for name, block in blocks.items()}
    print("\n" + ", ".join(f"{name}: {1e3 * taken:.0f} ms" for name, taken in found.items()))
    for name, block in list(blocks.items())[1:]:
        start = time.perf_counter()
        for _ in range(50):
            with block():
                pass
        entering = (time.perf_counter() - start) / 50
        print(f"entering {name}: {1e6 * entering:.0f} µs")
        assert entering < 1e-3


@pytest.mark.bench
@pytest.mark.parametrize("form", ["off", "int8", "int4", "nf4"])
def test_a_quantized_base_is_smaller(tmp_path: Path, form: str) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model: Any = peftc.apply("lora", tmp_path / "base", quantize=form).train()
    layers = [module for path, module in model.named_modules() if path.endswith("_proj")]
    size = sum(t.nbytes for m in layers for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    inputs = {"input_ids": torch.randint(0, 1000, (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.long)}
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        model(**inputs).logits.sum().backward()
        taken.append(time.perf_counter() - start)
    print(f"\n{form}: linear layers {size / 2**20:.2f} MiB of float32's 32, a training step {1e3 * min(taken):.0f} ms")
    assert size <= 2**25 * {"off": 1.0, "int8": 0.26, "int4": 0.15, "nf4": 0.15}[form]
