"""Attention regions: the part of a graph between projected queries, keys, values and the heads' outputs.

Two shapes exist in traced models: one fused `scaled_dot_product_attention` node, and the eager spelling, scores,
softmax, product. Both can do what prefix tuning needs (He et al. 2022, section 3.1):

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
from peftc.ir.program import is_call, shape_of

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
    def operands(self) -> list[fx.Node]: ...
    def extend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> None: ...
    def log_partition(self, builder: Builder) -> fx.Node: ...
    def attend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]: ...


def _rows(builder: Builder, rows: fx.Node, heads: int) -> fx.Node:
    """[l, kv, d] or [B, l, kv, d] to [1 or B, heads, l, d]."""
    if rows.meta["val"].dim() == 3:
        rows = builder.call(aten.unsqueeze.default, rows, 0)
    rows = builder.call(aten.transpose.int, rows, 1, 2)
    groups = heads // int(shape_of(rows)[1])
    return rows if groups == 1 else builder.call(aten.repeat_interleave.self_int, rows, groups, 1)


def _expand_batch(builder: Builder, rows: fx.Node, like: fx.Node) -> fx.Node:
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
            rows = builder.cast(_expand_batch(builder, _rows(builder, rows, heads), base), base.meta["val"].dtype)
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
        extra = total - base if isinstance(total, int) and isinstance(base, int) else _difference(builder, total, base)
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
        rows = [builder.cast(_rows(builder, part, self.head_count), dtype) for part in (keys, values)]
        return _softmax_over(builder, query, rows[0], rows[1], self._scale)


Step = tuple[Any, tuple[Any, ...]]
"""A pointwise op with the arguments that follow the value: (aten.mul.Tensor, (0.125,))."""


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _difference(builder: Builder, total: Any, base: Any) -> Any:
    return builder.call(operator.sub, total, base)


@dataclass(frozen=True, slots=True)
class EagerRegion:
    """scores -> softmax -> (dropout) -> product with the values, spelled out.

    The operands of the two products are 3-D [B * heads, ..] or 4-D [B, heads, ..]; `heads_out` is the 4-D value
    [B, heads, S, head_dim].
    """

    anchor: fx.Node
    """The softmax."""
    scores: fx.Node
    """The product q kᵀ."""
    product: fx.Node
    """The product of the weights with the values."""
    steps: tuple[Step, ...]
    """What is done to the scores of a row whatever its place: the scale, a soft cap. A prefix's rows undergo it too."""
    heads_out: fx.Node
    logits: fx.Node
    """The scores that rows are put in front of; a column of sinks may follow, and what a row is shifted by."""

    @property
    def entry(self) -> fx.Node:
        return self.anchor.prev if self.logits is self.anchor.args[0] else self.logits

    @property
    def _is_baddbmm(self) -> bool:
        return is_call(self.scores, aten.baddbmm.default)

    @property
    def queries(self) -> fx.Node:
        return _node(self.scores.args[1 if self._is_baddbmm else 0])

    @property
    def keys(self) -> fx.Node:
        """The keys as the product takes them: [.., head_dim, S]."""
        return _node(self.scores.args[2 if self._is_baddbmm else 1])

    @property
    def values(self) -> fx.Node:
        return _node(self.product.args[1])

    @property
    def head_count(self) -> int:
        return int(shape_of(self.heads_out)[1])

    def operands(self) -> list[fx.Node]:
        return [self.queries, self.keys, self.values]

    def _split(self, builder: Builder, node: fx.Node) -> fx.Node:
        """[B * heads, S, d] to [B, heads, S, d]."""
        if node.meta["val"].dim() == 4:
            return node
        sizes = [-1, self.head_count, builder.size(node, 1), builder.size(node, 2)]
        return builder.reshape(node, sizes)

    def _scores_of(self, builder: Builder, keys: fx.Node) -> fx.Node:
        query = self._split(builder, self.queries)
        rows = builder.cast(_rows(builder, keys, self.head_count), query.meta["val"].dtype)
        scores = builder.call(aten.matmul.default, query, builder.call(aten.transpose.int, rows, -2, -1))
        for target, arguments in self.steps:
            scores = builder.call(target, scores, *arguments)
        return scores

    def _base_scores(self) -> fx.Node:
        return self.logits

    def extend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> None:
        scores = self._base_scores()
        flat = scores.meta["val"].dim() == 3
        extra = builder.cast(self._scores_of(builder, keys), scores.meta["val"].dtype)
        if flat:
            extra = builder.call(aten.flatten.using_ints, extra, 0, 1)
        longer = builder.call(aten.cat.default, [extra, scores], -1)
        if self.logits is self.anchor.args[0]:
            self.anchor.replace_input_with(scores, longer)
        else:  # a row's largest is taken over the prefix too
            own = set(builder.nodes)
            scores.replace_all_uses_with(longer, delete_user_cb=lambda user: user not in own)
        rows = builder.cast(_rows(builder, values, self.head_count), self.values.meta["val"].dtype)
        if self.values.meta["val"].dim() == 3:
            rows = _expand_batch(builder, rows, self._split(builder, self.queries))
            rows = builder.call(aten.flatten.using_ints, rows, 0, 1)
        else:
            rows = _expand_batch(builder, rows, self.values)
        self.product.replace_input_with(self.values, builder.call(aten.cat.default, [rows, self.values], -2))

    def log_partition(self, builder: Builder) -> fx.Node:
        scores = self._base_scores()
        if scores.meta["val"].dim() == 3:
            scores = self._split(builder, scores)
        return builder.call(aten.logsumexp.default, scores, [-1], True)

    def attend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]:
        scores = self._scores_of(builder, keys)
        rows = builder.cast(_rows(builder, values, self.head_count), self.values.meta["val"].dtype)
        weights = builder.call(aten.softmax.int, scores, -1)
        return (
            builder.call(aten.matmul.default, weights, rows),
            builder.call(aten.logsumexp.default, scores, [-1], True),
        )
