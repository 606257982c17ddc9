"""The comparison of a peftc model with a reference: outputs, and gradients of every delta parameter."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from reference.case import Case
from reference.method import Method

Hyper = dict[str, int | float | bool | str]

TOLERANCE = 1e-5


def assert_equal(model: nn.Module, case: Case, method: type[Method], hyper: Hyper) -> dict[str, float]:
    """Outputs within 1e-5, gradients within 1e-5 of max(1, max|g|), with noise in every delta parameter; gives the
    largest differences of both."""
    delta = fill(model.eval())
    found = case.outputs(model(**case.inputs))
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in delta.items()}
    expected = case.plain(case.model.state_dict(), method(copies, hyper), case.inputs)
    assert len(found) == len(expected)
    outputs = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        outputs = max(outputs, float((ours - theirs).detach().abs().max()))
    assert outputs <= TOLERANCE
    if not delta:
        return {"outputs": outputs}
    return {"outputs": outputs, "gradients": _assert_equal_gradients(delta, found, copies, expected)}


def fill(model: nn.Module) -> dict[str, Tensor]:
    """The delta parameters by state name, filled with noise so that none is zero."""
    delta = {name: p for name, p in model.named_parameters() if re.search(r"(^|\.)peftc\.", name)}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in sorted(delta):
            delta[name].copy_(0.1 * torch.randn(delta[name].shape, generator=generator))
    return delta


def _assert_equal_gradients(
    delta: dict[str, Tensor], found: tuple[Tensor, ...], copies: dict[str, Tensor], expected: tuple[Tensor, ...]
) -> float:
    """A tensor that one side does not use is an error of `torch.autograd.grad`."""
    names = sorted(delta)
    ours = torch.autograd.grad(_scalar(found), [delta[name] for name in names])
    theirs = torch.autograd.grad(_scalar(expected), [copies[name] for name in names])
    worst = 0.0
    for name, left, right in zip(names, ours, theirs, strict=True):
        apart = float((left - right).abs().max()) / max(1.0, float(right.abs().max()))
        assert apart <= TOLERANCE, name
        worst = max(worst, apart)
    assert any(gradient.abs().max() > TOLERANCE for gradient in theirs)
    return worst


def _scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    """The outputs weighted by fixed noise, padded positions too."""
    generator = torch.Generator().manual_seed(5)
    return sum(((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs), torch.zeros(()))
