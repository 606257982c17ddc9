"""Every rule of the library computes its method: outputs and delta gradients equal those of the references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from reference.case import Case
from reference.methods import METHODS

TOLERANCE = 1e-5

ADAPTER = {"r": 5, "f": "relu", "bias": True}
SIZES: dict[str, dict[str, int | float | bool | str]] = {
    "full": {},
    "bitfit": {},
    "prompt": {"l": 3},
    "prefix": {"l": 3},
    "prefix_gated": {"l": 3},
    "prefix_mlp": {"l": 3, "m": 6},
    "prefix_ungated": {"l": 3},
    "houlsby": ADAPTER,
    "pfeiffer": ADAPTER,
    "seq_attn": ADAPTER,
    "seq_ffn": ADAPTER,
    "lora": {"r": 5, "alpha": 8.0},
    "lora_ffn": {"r": 5, "s": 2.0},
    "pa_attn": ADAPTER,
    "pa_ffn": ADAPTER,
    "pa_pa": {"r_attn": 3, "r_ffn": 5, "f": "relu", "bias": True},
    "mh_pa": ADAPTER,
    "scaled_pa": {**ADAPTER, "s": 2.0},
    "scaled_pa_learned": ADAPTER,
    "prefix_lora": {"l": 3, "r": 5, "s": 2.0},
    "mam": {**ADAPTER, "l": 3, "s": 2.0},
    "unipelt": {**ADAPTER, "l": 3, "r_lora": 4, "alpha": 8.0},
}
VARIANTS = [
    *SIZES.items(),
    ("houlsby", {"r": 5, "f": "gelu", "bias": False}),
    ("mam", {"l": 3, "r": 5, "s": 2.0, "f": "tanh", "bias": False}),
]
RULES = Path(__file__).parents[2] / "rules"


def test_every_rule_of_the_library_has_a_reference() -> None:
    assert {file.stem for file in RULES.glob("*.yaml")} == set(METHODS) == set(SIZES)


@pytest.mark.parametrize(
    ("rule", "hyper"), VARIANTS, ids=["-".join([rule, *(str(v) for v in hyper.values())]) for rule, hyper in VARIANTS]
)
def test_rule_equals_its_reference(rule: str, hyper: dict[str, Any], case: Case) -> None:
    model = peftc.apply(rule, case.directory, set=hyper, seed=0).eval()
    delta = fill(model)
    found = case.outputs(model(**case.inputs))
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in delta.items()}
    expected = case.plain(case.model.state_dict(), METHODS[rule](copies, hyper), case.inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= TOLERANCE
    if rule == "full":
        assert not delta
        assert all(parameter.requires_grad for parameter in model.parameters())
    else:
        compare_gradients(delta, found, copies, expected)


def fill(model: torch.nn.Module) -> dict[str, Tensor]:
    """The delta parameters by state name, filled with noise so that none is zero."""
    delta = {name: p for name, p in model.named_parameters() if re.search(r"(^|\.)peftc\.", name)}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in sorted(delta):
            delta[name].copy_(0.1 * torch.randn(delta[name].shape, generator=generator))
    return delta


def compare_gradients(
    delta: dict[str, Tensor], found: tuple[Tensor, ...], copies: dict[str, Tensor], expected: tuple[Tensor, ...]
) -> None:
    """The gradients of one scalar by every delta tensor; a tensor that one side does not use is an error."""
    names = sorted(delta)
    ours = torch.autograd.grad(scalar(found), [delta[name] for name in names])
    theirs = torch.autograd.grad(scalar(expected), [copies[name] for name in names])
    for name, left, right in zip(names, ours, theirs, strict=True):
        assert right.abs().max() > 0, name
        assert (left - right).abs().max() <= TOLERANCE * max(1.0, float(right.abs().max())), name


def scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    """The outputs weighted by fixed noise, padded positions too."""
    generator = torch.Generator().manual_seed(5)
    return sum(((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs), torch.zeros(()))
