"""Attention spelled out: scores -> softmax -> (dropout) -> product with the values. See `peftc.ir.attention`.

The operands of the two products are 3-D [B * heads, ..], 4-D [B, heads, ..], or have a further axis of blocks, as in
attention to a window: [B, blocks, heads, ..] or [B, heads, blocks, ..]. A prefix is seen by the queries of every block.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.ir.attention import head_rows, over_batch
from peftc.ir.builder import Builder
from peftc.ir.program import is_call, operand, shape_of

aten = torch.ops.aten

Step = tuple[Any, tuple[Any, ...]]
"""A pointwise op with the arguments that follow the value: (aten.mul.Tensor, (0.125,)); one may be an `OwnPlace`."""


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """An argument of a step: what `bias`, [.., 1, keys], which counts its places from the last key, gives each query's
    own key. A row that stands at every query's own place weighs the same however long the text is.
    """

    bias: fx.Node


_SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


@dataclass(frozen=True, slots=True)
class EagerRegion:
    """See the module docstring; `heads_out` is the 4-D value [B, heads, S, head_dim]."""

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
    after: tuple[Step, ...] = ()
    """What is done to every entry between `logits` and the softmax."""
    head_axis: int = 1
    """The axis of the operands that is the heads, where they have one."""

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

    @property
    def in_blocks(self) -> bool:
        return self.product.meta["val"].dim() > 4

    def operands(self) -> list[fx.Node]:
        return [self.queries, self.keys, self.values]

    def _split(self, builder: Builder, node: fx.Node) -> fx.Node:
        """[B * heads, S, d] to [B, heads, S, d]."""
        if node.meta["val"].dim() > 3:
            return node
        sizes = [-1, self.head_count, builder.size(node, 1), builder.size(node, 2)]
        return builder.reshape(node, sizes)

    def _rows(self, builder: Builder, rows: fx.Node, like: fx.Node) -> fx.Node:
        """Rows with the axes of `like`, where an axis of blocks is 1 long, in its dtype."""
        rows = builder.cast(head_rows(builder, rows, self.head_count), like.meta["val"].dtype)
        for _ in range(like.meta["val"].dim() - 4):
            rows = builder.call(aten.unsqueeze.default, rows, 2 if self.head_axis == 1 else 1)
        return rows

    def _scores_of(self, builder: Builder, keys: fx.Node) -> fx.Node:
        query = self._split(builder, self.queries)
        rows = self._rows(builder, keys, query)
        scores = builder.call(aten.matmul.default, query, builder.call(aten.transpose.int, rows, -2, -1))
        return _done(builder, scores, self.steps)

    def extend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> None:
        scores = self.logits
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
        self._lengthen_views(builder, longer)
        if builder.cursor < self.values:
            builder.cursor = self.values
        self.product.replace_input_with(self.values, self._longer_values(builder, values))

    def _lengthen_views(self, builder: Builder, longer: fx.Node) -> None:
        """Views between the softmax and the product may say how many keys there are."""
        node = _node(self.product.args[0])
        while node is not self.anchor:
            sizes = node.args[1] if len(node.args) > 1 else None
            if isinstance(sizes, (list, tuple)) and is_call(node, *_SIZED) and sizes[-1] != -1:
                node.update_arg(1, [*sizes[:-1], builder.size(longer, -1)])
            node = operand(node, 0)

    def _longer_values(self, builder: Builder, values: fx.Node) -> fx.Node:
        base = self.values
        if base.meta["val"].dim() == 3:
            rows = builder.cast(head_rows(builder, values, self.head_count), base.meta["val"].dtype)
            rows = over_batch(builder, rows, self._split(builder, self.queries))
            rows = builder.call(aten.flatten.using_ints, rows, 0, 1)
        else:
            rows = self._rows(builder, values, base)
            if not self.in_blocks:
                rows = over_batch(builder, rows, base)
            else:
                sizes = [builder.size(base, axis) for axis in range(base.meta["val"].dim() - 2)]
                rows = builder.call(aten.expand.default, rows, [*sizes, -1, -1])
        return builder.call(aten.cat.default, [rows, base], -2)

    def log_partition(self, builder: Builder) -> fx.Node:
        scores = _done(builder, self.logits, self.after)
        if scores.meta["val"].dim() == 3:
            scores = self._split(builder, scores)
        return builder.call(aten.logsumexp.default, scores, [-1], True)

    def attend(self, builder: Builder, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]:
        scores = _done(builder, self._scores_of(builder, keys), self.after)
        rows = builder.cast(head_rows(builder, values, self.head_count), self.values.meta["val"].dtype)
        weights = builder.call(aten.softmax.int, scores, -1)
        return (
            builder.call(aten.matmul.default, weights, rows),
            builder.call(aten.logsumexp.default, scores, [-1], True),
        )


def _done(builder: Builder, scores: fx.Node, steps: tuple[Step, ...]) -> fx.Node:
    for target, arguments in steps:
        given = [_own_place(builder, one.bias, scores) if isinstance(one, OwnPlace) else one for one in arguments]
        scores = builder.call(target, scores, *given)
    return scores


def _own_place(builder: Builder, bias: fx.Node, scores: fx.Node) -> fx.Node:
    """[.., queries, 1]: the bias of the last keys, which are the queries' own."""
    first = builder.call(operator.sub, builder.size(bias, -1), builder.size(scores, -2))
    return builder.call(aten.transpose.int, builder.call(aten.slice.Tensor, bias, -1, first), -2, -1)
