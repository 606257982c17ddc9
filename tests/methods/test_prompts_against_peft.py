"""Prompts that HF `peft` has: the same parameters give the same outputs and gradients, and export keeps the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from torch import Tensor

from methods.harness import Folded, apply_rule, difference, inputs, peft_model, scramble, tiny
from peftc import driver

WORST = 1e-5
RULES = ("p_tuning",)
"""The rules of the library that are held to peft here."""
ROWS, WIDTH = 4, 16
_NAMES = {
    "E": "embedding.weight", "W_1": "mlp_head.0.weight", "b_1": "mlp_head.0.bias", "W_2": "mlp_head.2.weight",
    "b_2": "mlp_head.2.bias", "W_3": "mlp_head.4.weight", "b_3": "mlp_head.4.bias",
}  # fmt: skip


def logits(model: Any) -> Tensor:
    """Of the tokens that are not padding; peft gives those of the prompt as well, in front."""
    given = inputs()
    found = model.eval()(**given, use_cache=False).logits
    return found[:, found.shape[1] - given["input_ids"].shape[1] :][given["attention_mask"].bool()]


def gradients(model: Any, parameters: list[Tensor]) -> list[Tensor]:
    result = logits(model)
    weight = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    return list(torch.autograd.grad((result * weight).mean(), parameters))


def test_p_tuning_computes_what_peft_does(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    tiny("llama").save_pretrained(tmp_path / "base")
    ours = apply_rule("p_tuning", tmp_path / "base", {"l": ROWS, "m": WIDTH})
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=ROWS, encoder_reparameterization_type="MLP", encoder_hidden_size=WIDTH
    )
    theirs = peft_model("llama", config)
    scramble((name, p) for name, p in theirs.named_parameters() if p.requires_grad)
    encoder = dict(theirs.prompt_encoder["default"].named_parameters())
    assert set(encoder) == set(_NAMES.values())
    assert set(ours.surgery.plan.parameters) == {f"peftc.prompt.{name}" for name in _NAMES}
    own = [ours.get_parameter(f"peftc.prompt.{name}") for name in _NAMES]
    other = [encoder[name] for name in _NAMES.values()]
    with torch.no_grad():
        for parameter, value in zip(own, other, strict=True):
            assert parameter.shape == value.shape
            parameter.copy_(value)
        assert difference(logits(theirs), logits(tiny("llama"))) > 1e-2
        apart = difference(logits(ours), logits(theirs))
    pairs = zip(gradients(ours, own), gradients(theirs, other), strict=True)
    slope = max(difference(a, b) for a, b in pairs)
    record("p_tuning", f"peft {peft.__version__} PromptEncoderConfig", WORST, outputs=apart, gradients=slope)
    assert max(apart, slope) <= WORST
    assert Folded.of(ours).results == {"constant"}


@pytest.mark.slow
def test_p_tuning_exports(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    ours = apply_rule("p_tuning", tmp_path / "base", {"l": ROWS, "m": WIDTH})
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    ours.save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"})
    comparisons = json.loads((tmp_path / "out" / "certificate.json").read_text())["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)
