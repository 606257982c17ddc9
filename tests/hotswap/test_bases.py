"""Bases of other kinds: grouped keys and a causal mask, half precision, heads that deltas train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fold.support import tiny

import peftc
from hotswap.conftest import export
from hotswap.support import answer, batch, difference
from peftc import driver
from peftc.ort import Session, read_adapter


@pytest.mark.slow
def test_lora_an_adapter_and_a_prefix_on_a_decoder_with_grouped_keys(tmp_path: Path) -> None:
    served = export(tmp_path, "llama", {"lora": ("lora", {"r": 4}), "mam": ("mam", {"r": 6, "l": 3})})
    session = Session(served.directory)
    for name in session.available:
        session.load(name)
    for name in (None, "lora", "mam"):
        for rows, length in ((1, 7), (3, 12)):
            inputs = batch(rows, length, session.inputs)
            assert difference(session.run(inputs, name)["logits"], answer(peftc.load(served.deltas[name]) if name else
                              _plain(served.base), inputs)) < 1e-5  # fmt: skip


def _plain(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.slow
def test_heads_go_with_the_adapters_on_a_base_in_half_precision(tmp_path: Path) -> None:
    tiny("bert").to(torch.float16).save_pretrained(tmp_path / "base")
    for rule in ("lora", "houlsby"):
        model: Any = peftc.apply(rule, tmp_path / "base", {"r": 4}, head="sequence-classification", num_labels=3)
        with torch.no_grad():
            for name in sorted(model.surgery.plan.trainable):
                parameter = model.get_parameter(name)
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
        model.save_pretrained(tmp_path / rule)
    report = driver.export_adapters([tmp_path / "lora", tmp_path / "houlsby"], tmp_path / "served")
    dtypes = read_adapter(tmp_path / "served" / "lora.onnx_adapter").dtypes
    assert dtypes["classifier.weight"] == "tensor(float16)"
    session = Session(tmp_path / "served")
    for adapter in report.adapters:
        session.load(adapter.name)
        inputs = batch(2, 9, session.inputs)
        wanted = answer(peftc.load(tmp_path / adapter.name), inputs)
        assert difference(session.run(inputs, adapter.name)["logits"], wanted) < 2e-3
        assert difference(session.run(inputs)["logits"], wanted) > 2e-2
