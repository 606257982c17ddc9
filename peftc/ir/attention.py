"""Attention regions: the part of a graph between projected queries, keys, values and the heads' outputs.

Two shapes exist in traced models: one fused `scaled_dot_product_attention` node, and the eager spelling, scores,
softmax, product (`peftc.ir.eager`). Both can do what prefix tuning needs (He et al. 2022, section 3.1):

- `extend(keys, values)`: attend to `l` more rows, whose scores get no bias and no mask;
- `log_partition()`: logsumexp of the scores per query, the denominator in the gate λ;
- `attend(keys, values)`: the same queries over other rows alone, with their log partition.

Keys and values come as [l, kv_heads, head_dim] or [B, l, kv_heads, head_dim]. Heads are repeated for grouped
queries. Results have the layout of `heads`: [B, heads, S, head_dim].
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from peftc.ir.builder import Builder
from peftc.ir.program import shape_of

aten = torch.ops.aten


class Region(Protocol):
    """What both spellings of attention offer."""

    @property
    def anchor(self) -> fx.Node: ...
    @property
    def entry(self) -> fx.Node:
        """The node after which a prefix is written."""
        ...

    @property
    def heads_out(self) -> fx.Node: ...
    @property
    def head_count(self) -> int: ...
    @property
    def in_blocks(self) -> bool:
        """Whether queries are cut into blocks, so that `heads` lies otherwise here and only `extend` can be done."""
        ...

    def operands(self) -> list[fx.Node]: ...
    def extend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> None: ...
    def log_partition(self, builder: Builder) -> fx.Node: ...
    def attend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]: ...


def head_rows(builder: Builder, rows: fx.Node, heads: int) -> fx.Node:
    """[l, kv, d] or [B, l, kv, d] to [1 or B, heads, l, d]."""
    if rows.meta["val"].dim() == 3:
        rows = builder.call(aten.unsqueeze.default, rows, 0)
    rows = builder.call(aten.transpose.int, rows, 1, 2)
    groups = heads // int(shape_of(rows)[1])
    return rows if groups == 1 else builder.call(aten.repeat_interleave.self_int, rows, groups, 1)


def over_batch(builder: Builder, rows: fx.Node, like: fx.Node) -> fx.Node:
    if shape_of(rows)[0] != 1:
        return rows
    return builder.call(aten.expand.default, rows, [builder.size(like, 0), -1, -1, -1])


def _softmax_over(
    builder: Builder, queries: fx.Node, keys: fx.Node, values: fx.Node, scale: float
) -> tuple[fx.Node, fx.Node]:
    """softmax(q kᵀ scale) v and the log partition [B, heads, S, 1]."""
    scores = builder.call(aten.matmul.default, queries, builder.call(aten.transpose.int, keys, -2, -1))
    scores = builder.call(aten.mul.Tensor, scores, scale)
    weights = builder.call(aten.softmax.int, scores, -1)
    return builder.call(aten.matmul.default, weights, values), builder.call(aten.logsumexp.default, scores, [-1], True)


@dataclass(frozen=True, slots=True)
class FusedRegion:
    """One `scaled_dot_product_attention` node."""

    anchor: fx.Node

    @property
    def entry(self) -> fx.Node:
        return self.anchor.prev

    @property
    def heads_out(self) -> fx.Node:
        return self.anchor

    @property
    def head_count(self) -> int:
        return int(shape_of(self.anchor)[1])

    @property
    def in_blocks(self) -> bool:
        return False

    def operands(self) -> list[fx.Node]:
        return [arg for arg in self.anchor.args[:3] if isinstance(arg, fx.Node)]

    def _option(self, index: int, name: str, default: Any) -> Any:
        if len(self.anchor.args) > index:
            return self.anchor.args[index]
        return self.anchor.kwargs.get(name, default)

    @property
    def _scale(self) -> float:
        scale = self._option(6, "scale", None)
        return 1 / math.sqrt(int(shape_of(self.operands()[0])[-1])) if scale is None else scale

    def extend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> None:
        query, key, value = self.operands()
        heads = int(shape_of(key)[1])
        mask, is_causal = self._option(3, "attn_mask", None), self._option(5, "is_causal", False)
        parts = []
        for rows, base in ((keys, key), (values, value)):
            rows = builder.cast(over_batch(builder, head_rows(builder, rows, heads), base), base.meta["val"].dtype)
            parts.append(builder.call(aten.cat.default, [rows, base], 2))
        if mask is None and is_causal:
            mask = self._causal_mask(builder, query, key)
        if isinstance(mask, fx.Node):
            mask = self._extend_mask(builder, mask, builder.size(parts[0], 2), builder.size(key, 2))
        options = dict(self.anchor.kwargs)
        options.pop("attn_mask", None)
        dropout = self._option(4, "dropout_p", 0.0)
        options = {k: v for k, v in options.items() if k not in ("dropout_p", "is_causal")}
        self.anchor.args = (query, parts[0], parts[1], mask, dropout, False)
        self.anchor.kwargs = options

    def _causal_mask(self, builder: Builder, query: fx.Node, key: fx.Node) -> fx.Node:
        like = query.meta["val"]
        sizes = [builder.size(query, 2), builder.size(key, 2)]
        ones = builder.call(aten.ones.default, sizes, dtype=torch.bool, device=like.device)
        return builder.call(aten.tril.default, ones)

    def _extend_mask(self, builder: Builder, mask: fx.Node, total: Any, base: Any) -> fx.Node:
        """Let every query see the prefix: True for a boolean mask, 0 for an additive one."""
        value = mask.meta["val"]
        if value.shape[-1] == 1:  # broadcast over keys: give it the keys' axis first
            mask = builder.call(aten.expand.default, mask, [-1] * (value.dim() - 1) + [base])
        fixed = isinstance(total, int) and isinstance(base, int)
        extra = total - base if fixed else builder.call(operator.sub, total, base)
        sizes = [builder.size(mask, axis) for axis in range(value.dim() - 1)] + [extra]
        full = builder.call(aten.full.default, sizes, value.dtype == torch.bool, dtype=value.dtype, device=value.device)
        return builder.call(aten.cat.default, [full, mask], -1)

    def log_partition(self, builder: Builder) -> fx.Node:
        query, key, _ = self.operands()
        heads = self.head_count
        if int(shape_of(key)[1]) != heads:
            key = builder.call(aten.repeat_interleave.self_int, key, heads // int(shape_of(key)[1]), 1)
        scores = builder.call(aten.matmul.default, query, builder.call(aten.transpose.int, key, -2, -1))
        scores = builder.call(aten.mul.Tensor, scores, self._scale)
        mask = self._option(3, "attn_mask", None)
        if mask is None and self._option(5, "is_causal", False):
            mask = self._causal_mask(builder, query, self.operands()[1])
        if isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool:
            hidden = builder.call(aten.logical_not.default, mask)
            scores = builder.call(aten.masked_fill.Scalar, scores, hidden, float("-inf"))
        elif isinstance(mask, fx.Node):
            scores = builder.call(aten.add.Tensor, scores, mask)
        return builder.call(aten.logsumexp.default, scores, [-1], True)

    def attend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]:
        query = self.operands()[0]
        dtype = query.meta["val"].dtype
        rows = [builder.cast(head_rows(builder, part, self.head_count), dtype) for part in (keys, values)]
        return _softmax_over(builder, query, rows[0], rows[1], self._scale)
