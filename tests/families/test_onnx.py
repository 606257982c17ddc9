"""MAM on every family through `merge --export onnx`: the certificate holds, and so does a batch it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from families.conftest import Subject
from families.family import FAMILIES, fill
from peftc import driver

TOLERANCE = 1e-4
QUICK = ("bert", "opt", "bart", "vit")
"""An encoder, a decoder, an encoder-decoder and a model of images; the others are exported by `make test-all`."""
FAMILY = [pytest.param(f, id=f.name, marks=() if f.name in QUICK else pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("subject", FAMILY, indirect=True, scope="session")
def test_the_exported_model_equals_the_adapted_one(subject: Subject, mam: Any, tmp_path: Path) -> None:
    fill(mam)
    mam.eval().save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"}, cache=False)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    comparisons = certificate["comparisons"]
    assert len({comparison["inputs"] for comparison in comparisons}) >= 3
    assert any("batch 1," in comparison["inputs"] for comparison in comparisons)
    for comparison in comparisons:
        assert comparison["holds"] and comparison["absolute"] <= TOLERANCE, comparison
        assert comparison["scale"] > 0.01, comparison
    for lengths in ((9,), (10, 4, 6, 8)):
        _compare(subject, mam, tmp_path / "out" / "model.onnx", lengths)


def _compare(subject: Subject, model: Any, path: Path, lengths: tuple[int, ...]) -> None:
    inputs = subject.family.inputs(lengths=lengths, target=7)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    if "position_ids" in {argument.name for argument in session.get_inputs()}:
        feeds["position_ids"] = np.arange(lengths[0])[None].repeat(len(lengths), 0)
    (found,) = session.run(["logits"], feeds)
    real = inputs.get("attention_mask")
    if real is not None and expected.shape[:2] == real.shape:
        expected, found = expected[real.bool().numpy()], found[real.bool().numpy()]
    assert np.abs(found - expected).max() <= TOLERANCE
