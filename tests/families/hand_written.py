"""Prefixes by hand: an attention of plain torch that models of transformers are given to call, and hooks on modules.

Nothing of peftc computes here. `attending` runs a model whose attentions go through transformers' attention interface
with rows put in front of the keys and values of each attention module that has some.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "hand_written"
Rows = tuple[Tensor, Tensor]
"""Keys [l, kv_heads, key_dim] and values [l, kv_heads, head_dim]."""

_ROWS: dict[nn.Module, Rows] = {}


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None = None,
    is_causal: bool | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """softmax(q [P_k; k]ᵀ scale + [0; mask]) [P_v; v], one head after the other."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = torch.zeros(query.shape[-2], key.shape[-2], dtype=query.dtype)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and query.shape[-2] == key.shape[-2] > 1:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    bias = bias[None, None] + sum(part for part in (mask, position_bias) if part is not None)
    heads = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        keys, values = key[:, group], value[:, group]
        shift = bias[:, head if bias.shape[1] > 1 else 0].expand(len(query), -1, -1)
        if module in _ROWS:
            own = head * _ROWS[module][0].shape[1] // query.shape[1]
            rows = [part[:, own].expand(len(query), -1, -1) for part in _ROWS[module]]
            keys, values = torch.cat([rows[0], keys], 1), torch.cat([rows[1], values], 1)
            shift = torch.cat([shift.new_zeros(len(query), query.shape[2], rows[0].shape[1]), shift], 2)
        heads.append(torch.softmax(query[:, head] @ keys.mT * scale + shift, -1) @ values)
    return torch.stack(heads, 2), None


@contextlib.contextmanager
def attending(model: nn.Module, rows: Mapping[str, Rows]) -> Iterator[nn.Module]:
    """The model with `rows` in front of the keys and values of the attention module of each path."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    _ROWS.update({model.get_submodule(path): its for path, its in rows.items()})
    try:
        yield model
    finally:
        _ROWS.clear()
