"""What an attention's inputs have to do with each other: whether they are one stream, and whether it is causal."""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import fx

from peftc.ir.program import is_call, is_getitem, operand, shape_of
from peftc.locate.walk import CONVS, DROPOUT, NORMS, POINTWISE, VIEWS, backward, inputs_of

aten = torch.ops.aten


def same_stream(x: fx.Node, ctx: fx.Node) -> bool:
    """Whether two projection inputs come from one hidden state: their chains back to a residual sum meet."""
    return bool(_chain(x) & _chain(ctx))


def _chain(node: fx.Node) -> set[fx.Node]:
    """The node and what it comes from through linears, norms, views, down to the first sum of two streams."""
    chain = {node}
    for _ in range(64):
        if is_getitem(node):
            node = operand(operand(node, 0), 0)
        tensors = [n for n in inputs_of(node) if n.op != "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
        known = is_call(node, *VIEWS, *DROPOUT, *NORMS, *CONVS, aten.linear.default, aten.slice.Tensor, aten.mul.Tensor)
        if is_call(node, aten.cat.default) and len(tensors) > 1:  # parts of one stream (CvT's class token) are it
            return chain | set.intersection(*map(_chain, tensors))
        known = known or is_call(node, aten.cat.default)  # behind what a cache holds
        rms = is_call(node, *POINTWISE, aten.mean.dim, aten.rsqrt.default) and len(tensors) == 1
        if not tensors or not (known or rms):
            return chain
        node = tensors[0] if not is_call(node, aten.mul.Tensor) else _wider(tensors)
        chain.add(node)
    return chain


def _wider(nodes: list[fx.Node]) -> fx.Node:
    """Of the operands of x * rsqrt(..), the one that is x."""
    return max(nodes, key=lambda n: math.prod(d for d in shape_of(n) if isinstance(d, int)))


_COMPARISONS = (
    aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor, aten.tril.default, aten.triu.default,
)  # fmt: skip


def is_causal(anchor: fx.Node, made: Container[fx.Node]) -> bool:
    """Whether positions are compared with positions on the way to the mask; not beyond what is in `made`."""
    if is_call(anchor, aten.scaled_dot_product_attention.default):
        if (len(anchor.args) > 5 and anchor.args[5]) or anchor.kwargs.get("is_causal"):
            return True
        mask = anchor.args[3] if len(anchor.args) > 3 else anchor.kwargs.get("attn_mask")
        start = [mask] if isinstance(mask, fx.Node) else []
    else:
        start = [anchor]
    return any(is_call(node, *_COMPARISONS) for node in backward(start, lambda n: n in made))
