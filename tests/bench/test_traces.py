"""Reading a trace back against making it, for a small encoder and for a Llama of 32 layers without weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from peftc.frontend.trace import build_skeleton, default_inputs, trace
from peftc.store.trace_cache import VARIABLE

MODELS: dict[str, tuple[type[Any], Any]] = {
    "BERT, 6 layers": (transformers.BertModel, transformers.BertConfig(num_hidden_layers=6)),
    "Llama, 32 layers": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        ),
    ),
}  # fmt: skip


@pytest.mark.bench
@pytest.mark.parametrize("name", MODELS)
def test_reading_a_trace_takes_less_than_making_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds() -> float:
        start = time.process_time()
        trace(skeleton, inputs)
        return time.process_time() - start

    skeleton = build_skeleton(*MODELS[name])
    inputs = default_inputs(skeleton.model)
    monkeypatch.setenv(VARIABLE, "off")
    trace(skeleton, inputs)  # imports
    made = min(seconds() for _ in range(3))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    kept = seconds()
    read = min(seconds() for _ in range(3))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    print(
        f"\n{name}: made {made:.2f} s, made and kept {kept / made:.2f} of that, read {read / made:.2f} of that, "
        f"{size / 2**20:.1f} MiB"
    )
    assert read < made
