"""The references stand on their own: the plain models are Hugging Face's, and the two prefixes are one function."""

from __future__ import annotations

import copy

import torch

from reference.case import Case
from reference.method import Method
from reference.methods import Prefix, PrefixGated


def test_plain_model_equals_hugging_face(case: Case) -> None:
    model = copy.deepcopy(case.model).double()
    with torch.no_grad():
        expected = case.outputs(model(**case.inputs))
        found = case.plain(model.state_dict(), Method({}, {}), case.inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12


def test_prefix_by_concatenation_equals_prefix_by_gate(case: Case) -> None:
    state = {name: tensor.double() for name, tensor in case.model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    owners = [name for name, _ in case.model.named_modules() if name.endswith(("attention", "attn"))]
    names = [f"{owner}.peftc.prefix.{name}" for owner in owners for name in ("P_k", "P_v")]
    delta = {name: torch.randn(5, 4, 8, dtype=torch.float64, generator=generator) for name in names}
    base = case.plain(state, Method({}, {}), case.inputs)
    concat, gated = (case.plain(state, kind(delta, {}), case.inputs) for kind in (Prefix, PrefixGated))
    for left, right, unmodified in zip(concat, gated, base, strict=True):
        assert (left - right).abs().max() <= 1e-12
        assert (left - unmodified).abs().max() > 1e-2
