"""Quantized weights: a matrix in few bits with a scale for each row or group, made whole only where it is used.

    data, scale = pack(weight, "nf4")           # uint8 of half as many entries, float32 of one in 64
    dequantize(data, scale, "nf4", torch.float32)
    linear(x, data, scale, bias, "nf4")         # x Wᵀ + b; keeps neither W nor a gradient of it

    int8  a row shares the scale max|w| / 127
    int4  a group of a row shares max|w| / 7; whole levels from -8 to 7
    nf4   a group shares max|w|; 16 levels at the quantiles of a normal distribution (Dettmers et al. 2023, QLoRA)

Invariant: the same data and scale give the same weight, bit for bit, wherever it is made whole.
"""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Any, Final

import torch

FORMS: Final = ("int8", "int4", "nf4")
GROUPS: Final = (64, 32, 16)
"""How many entries of a row share a scale in the forms of 4 bits: the first that divides the row."""

_QUANTILE = 0.9677083
"""The share of a normal distribution below the highest level, from QLoRA's code."""


def packable(weight: torch.Tensor) -> bool:
    """Whether a weight is a matrix whose rows can be grouped."""
    return weight.dim() == 2 and weight.is_floating_point() and weight.shape[1] % GROUPS[-1] == 0


def pack(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The data and the scales [rows, groups] (float32, or float64 of a float64 weight) of a matrix."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    size = wide.shape[1] if form == "int8" else next(group for group in GROUPS if wide.shape[1] % group == 0)
    grouped = wide.unflatten(1, (-1, size))
    largest = grouped.abs().amax(-1)
    scale = largest / {"int8": 127, "int4": 7, "nf4": 1}[form]
    shares = (grouped / torch.where(scale > 0, scale, 1).unsqueeze(-1)).flatten(1)
    if form == "int8":
        return shares.round().clamp(-127, 127).to(torch.int8), scale
    if form == "int4":
        codes = shares.round().clamp(-8, 7) + 8
    else:
        table = _levels(torch.float64, wide.device)
        codes = torch.bucketize(shares.double(), (table[1:] + table[:-1]) / 2)
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | (high << 4), scale


def dequantize(data: torch.Tensor, scale: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight [rows, columns] in `dtype`, computed in the dtype of the scales."""
    if form == "int8":
        return (data.to(scale.dtype) * scale).to(dtype)
    codes = torch.stack([data & 15, data >> 4], -1).flatten(1)
    values = codes.to(scale.dtype) - 8 if form == "int4" else _levels(scale.dtype, scale.device)[codes.int()]
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1).to(dtype)


def linear(
    x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, form: str, stored: str = "out"
) -> torch.Tensor:
    """x Wᵀ + b, or x W + b for a weight that is `stored` as "in" (rows are inputs, as GPT-2's Conv1D has it).

    W is there while the product is computed, and made anew for the gradient of x; it is never saved for it.
    """
    return _Linear.apply(x, data, scale, bias, form, stored)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, data: Any, scale: Any, bias: Any, form: str, stored: str) -> torch.Tensor:
        ctx.save_for_backward(data, scale)
        ctx.form, ctx.stored = form, stored
        weight = dequantize(data, scale, form, x.dtype)
        return torch.nn.functional.linear(x, weight if stored == "out" else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (data, scale) = gradients, ctx.saved_tensors
        x = bias = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(data, scale, ctx.form, gradient.dtype)
            x = gradient @ (weight if ctx.stored == "out" else weight.t())
        if ctx.needs_input_grad[3]:
            bias = gradient.flatten(0, -2).sum(0)
        return x, None, None, bias, None, None


@functools.cache
def _quantiles() -> tuple[float, ...]:
    """The 16 levels of nf4: 7 below 0, and 8 above, each evenly spread over one half of a normal distribution."""
    normal = NormalDist()

    def half(count: int) -> list[float]:
        return [normal.inv_cdf(_QUANTILE + (0.5 - _QUANTILE) * step / count) for step in range(count)]

    above, below = half(8), half(7)
    return tuple(level / above[0] for level in (*(-level for level in below), 0.0, *reversed(above)))


def _levels(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(_quantiles(), dtype=dtype, device=device)
