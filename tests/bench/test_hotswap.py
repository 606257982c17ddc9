"""One session with a base and three different deltas: how far each is from torch, what a switch and a run cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import peftc
from peftc import driver
from peftc.ort import Session

BASES: dict[str, Callable[[], Any]] = {
    "BERT, 6 layers of 384": lambda: BertModel(
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=5000
        )
    ),
    "Llama, 2 layers of 128, grouped keys": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=256,
            vocab_size=5000,
        )
    ),
}  # fmt: skip
METHODS = {"lora": {"r": 16}, "houlsby": {"r": 32}, "mam": {"r": 64, "l": 16}}


@pytest.mark.bench
@pytest.mark.parametrize("base", BASES)
def test_three_deltas_on_one_session(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    BASES[base]().save_pretrained(tmp_path / "base")
    for rule, hyper in METHODS.items():
        model: Any = peftc.apply(rule, tmp_path / "base", set=hyper)
        with torch.no_grad():
            for name in model.surgery.plan.parameters:
                model.get_parameter(name).add_(0.05 * torch.randn(model.get_parameter(name).shape))
        model.save_pretrained(tmp_path / rule)
    report = driver.export_adapters([tmp_path / rule for rule in METHODS], tmp_path / "served")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = Session(tmp_path / "served", options=options)
    inputs = _inputs(session.inputs)
    print(f"\n{base}; 1 row of 64 tokens, one thread, onnxruntime {onnxruntime.__version__}")
    print(f"{'method':10}{'file':>10}{'load':>10}{'switch':>10}{'run':>10}{'alone':>10}{'largest difference':>22}")
    rows: dict[str | None, str] = {None: f"{'(base)':10}{'':>10}{'':>10}"}
    for adapter in report.adapters:
        load = _seconds(lambda name=adapter.name: session.load(name), 5)
        rows[adapter.name] = f"{adapter.name:10}{adapter.nbytes / 1e3:>8.0f}kB{1e3 * load:>8.2f}ms"
    compared = {None: report.base, **{adapter.name: adapter.comparisons for adapter in report.adapters}}
    for name, row in rows.items():
        run = _seconds(lambda name=name: session.run(inputs, name), 30)
        alone = _alone(tmp_path, name, inputs)
        largest = max(comparison.absolute for comparison in compared[name])
        switch = _switch(session, inputs, name)
        print(f"{row}{1e6 * switch:>8.0f}µs{1e3 * run:>8.2f}ms{1e3 * alone:>8.2f}ms{largest:>22.1e}")
        assert largest < 1e-5
        assert switch < run  # far less, on a quiet machine


def _inputs(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, 5000, (1, 64))
    made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(64)[None]}
    return {name: made[name] for name in names}


def _seconds(call: Callable[[], object], times: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(times))


def _switch(session: Session, inputs: dict[str, np.ndarray], name: str | None) -> float:
    """What the first run after another adapter takes more than one after the same, each at its best."""
    same, changed = [], []
    for _ in range(30):
        session.run(inputs, "houlsby" if name == "lora" else "lora")
        changed.append(_seconds(lambda: session.run(inputs, name), 1))
        same.append(_seconds(lambda: session.run(inputs, name), 1))
    return max(0.0, min(changed) - min(same))


def _alone(root: Path, name: str | None, inputs: dict[str, np.ndarray]) -> float:
    """A run of the model that `merge` makes of these deltas alone; LoRA's for the base's, which has the same graph."""
    out = root / "alone" / (name or "lora")
    if not out.exists():
        driver.merge(root / (name or "lora"), out, export={"onnx"}, outputs=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return _seconds(lambda: session.run(None, inputs), 30)
