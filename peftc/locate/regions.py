"""Attention regions found from their anchor: the fused op, or the softmax between two products of matrices.

From the softmax a walk goes back to q kᵀ and forward to the product with the values. Scores may be a sum: of the
product of contents, the one walked to, with products of positions, which are shifted or gathered into place and so
end the walk, and with biases and masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from peftc.ir.attention import FusedRegion
from peftc.ir.eager import EagerRegion, OwnPlace, Step
from peftc.ir.program import Program, is_call, is_getitem, operand, shape_of
from peftc.locate.walk import DROPOUT, VIEWS, backward, inputs_of, is_tensor, skip_back

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Found:
    """The values of one softmax over keys. `products` are those of its weights with values."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    anchor: fx.Node
    products: tuple[fx.Node, ...]
    steps: tuple[Step, ...] = ()
    scores: fx.Node | None = None
    logits: fx.Node | None = None
    after: tuple[Step, ...] = ()
    split: str = ""
    """Why no rows can be put in front of the keys, where that is so."""

    @property
    def product(self) -> fx.Node:
        return self.products[0]

    @property
    def width(self) -> int:
        """Of one head's result."""
        return int(shape_of(self.product)[-1])

    def region(self, heads_out: fx.Node, head_axis: int) -> FusedRegion | EagerRegion:
        if self.scores is None or self.logits is None:
            return FusedRegion(self.anchor)
        return EagerRegion(
            self.anchor, self.scores, self.product, self.steps, heads_out, self.logits, self.after, head_axis
        )


def find_softmaxes(program: Program) -> Iterator[Found]:
    """Every attention op of the graph in order."""
    for node in program.graph.nodes:
        if is_call(node, aten.scaled_dot_product_attention.default) and len(shape_of(node)) == 4:
            query, key, value = (operand(node, index) for index in range(3))
            yield Found(query, key, value, node, (node,))
        elif is_call(node, aten.softmax.int, aten._softmax.default):
            found = _eager(node, program)
            if found is not None:
                yield found


_PRODUCTS = (aten.bmm.default, aten.matmul.default)
_MADE_OF_PRODUCTS = (*_PRODUCTS, aten.baddbmm.default)


def _eager(softmax: fx.Node, program: Program) -> Found | None:
    """softmax(.. q kᵀ ..) v, where the product with v follows through views and dropout, and a slice without sinks."""
    if softmax.meta["val"].dim() not in (3, 4, 5):
        return None
    products = [node for node in _forward_to(softmax, _PRODUCTS) if operand(node, 0) in _reached(softmax)]
    logits, after = _before_shift(operand(softmax, 0))
    candidates = list(_score_products(logits, program))
    if not products or not candidates:
        return None
    split = len(products) > 1 or candidates[0][1] is None
    place = -1 if split else 0  # what is beside a token's own keys, global ones say, comes first
    (scores, steps), value = candidates[place], operand(products[place], 1)
    if products[place].meta["val"].dim() < 3 or program.parameter_name(skip_back(value)):
        return None
    first = 1 if is_call(scores, aten.baddbmm.default) else 0
    query, key = operand(scores, first), skip_back(operand(scores, first + 1), *VIEWS)
    scaled = _scale_of_keys(operand(scores, first + 1))
    return Found(
        query,
        key,
        value,
        softmax,
        tuple(products),
        (*scaled, *(steps or ())),
        scores,
        logits,
        after,
        _SPLIT if split else "",
    )


_SPLIT = "the softmax of this attention runs over keys of several products, and a prefix would belong to none of them"


def _scale_of_keys(node: fx.Node) -> tuple[Step, ...]:
    """A factor that the product takes with its keys, where others multiply the scores by it."""
    node = skip_back(node, aten.transpose.int, aten.permute.default, aten.to.dtype)
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return ()
    factor = node.args[1]
    number = isinstance(factor, (int, float)) or (isinstance(factor, fx.Node) and factor.meta["val"].dim() == 0)
    return ((node.target, (factor,)),) if number else ()


def _before_shift(node: fx.Node) -> tuple[fx.Node, tuple[Step, ...]]:
    """The scores themselves, where their row's largest is taken off for the sake of the exponential; what follows."""
    after: list[Step] = []
    shifted = skip_back(node)
    while is_call(shifted, aten.mul.Tensor, aten.div.Tensor) and isinstance(shifted.args[1], (int, float)):
        after.append((shifted.target, shifted.args[1:]))
        shifted = skip_back(operand(shifted, 0))
    if not is_call(shifted, aten.sub.Tensor) or not isinstance(shifted.args[1], fx.Node):
        return node, ()
    scores, largest = operand(shifted, 0), skip_back(operand(shifted, 1))
    if is_getitem(largest) and is_call(operand(largest, 0), aten.max.dim):
        largest = operand(largest, 0)
    elif not is_call(largest, aten.amax.default):
        return node, ()
    return (scores, tuple(reversed(after))) if operand(largest, 0) is scores else (node, ())


_ONWARD = (*VIEWS, *DROPOUT, aten.slice.Tensor)


def _reached(softmax: fx.Node) -> set[fx.Node]:
    """The weights as products may take them."""
    found, queue = {softmax}, [softmax]
    while queue:
        for user in queue.pop().users:
            if user not in found and is_call(user, *_ONWARD):
                found.add(user)
                queue.append(user)
    return found


def _forward_to(node: fx.Node, targets: tuple[object, ...]) -> list[fx.Node]:
    return sorted(user for reached in _reached(node) for user in reached.users if is_call(user, *targets))


_BESIDE = (
    aten.add.Tensor, aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self, aten.cat.default,
    aten.max.other, aten.maximum.default,
)  # fmt: skip
"""What brings a bias or a mask to the scores, or a column of sinks that no value belongs to; a bound from below, of
masked scores."""

Product = tuple[fx.Node, tuple[Step, ...] | None]


def _score_products(node: fx.Node, program: Program, depth: int = 32) -> Iterator[Product]:
    """The products that the scores are a sum of, each with what else is done to its scores one by one (see `Step`).

    None for the steps says that it makes a part of each row alone, beside another product.
    """
    if depth == 0 or not isinstance(node, fx.Node):
        return
    if is_call(node, *_MADE_OF_PRODUCTS):
        alpha: Step = (aten.mul.Tensor, (node.kwargs.get("alpha", 1.0),))
        yield node, (alpha,) if is_call(node, aten.baddbmm.default) else ()
        return
    steps: tuple[Step, ...] = ()
    sources = [argument for argument in node.args[:1] if isinstance(argument, fx.Node)]
    if is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        steps = ((node.target, node.args[1:]),)
    elif is_call(node, aten.mul.Tensor):
        sources, steps = _scaled(node, program)
    elif is_call(node, aten.tanh.default):
        steps = ((node.target, ()),)
    elif is_call(node, *_BESIDE):
        sources = inputs_of(node)
        if is_call(node, aten.add.Tensor) and (bias := next(filter(_counts_from_the_last_key, sources), None)):
            steps = ((node.target, (OwnPlace(bias),)),)
    elif not is_call(node, *VIEWS, aten.sub.Tensor):
        return
    found = [list(_score_products(source, program, depth - 1)) for source in sources]
    beside = is_call(node, aten.cat.default) and sum(map(bool, found)) > 1
    for product, before in (one for several in found for one in several):
        yield product, None if beside or before is None else (*before, *steps)


def _counts_from_the_last_key(bias: fx.Node) -> bool:
    """Whether it is the end of a table that says one number for each place, as long as there are keys (MPT's ALiBi).

    Softmax admits that, for it is the same shift for all keys of a row; rows of a prefix have to be shifted with them.
    """
    cut = False
    while is_call(bias, aten.slice.Tensor, *VIEWS):
        if is_call(bias, aten.slice.Tensor) and bias.args[1] in (-1, bias.meta["val"].dim() - 1):
            cut = cut or (len(bias.args) == 3 and isinstance(bias.args[2], fx.Node))
        bias = operand(bias, 0)
    return cut and is_tensor(bias) and shape_of(bias)[-2:-1] == (1,) and isinstance(shape_of(bias)[-1], int)


def _scaled(node: fx.Node, program: Program) -> tuple[list[fx.Node], tuple[Step, ...]]:
    """Scores times something else: the same for every query and key of a head, or a mask that a prefix needs not."""
    scores = [source for source in inputs_of(node) if any(_score_products(source, program, 16))]
    others = [source for source in inputs_of(node) if source not in scores]
    if len(scores) != 1 or len(others) != 1:
        return [], ()
    if _one_a_head(others[0], scores[0]):
        return scores, ((node.target, (others[0],)),)
    return (scores, ()) if _is_mask(others[0], program) else ([], ())


def _one_a_head(factor: fx.Node, scores: fx.Node) -> bool:
    """A scale that is the same for every query and key: a prefix's scores are multiplied by it too.

    Of three axes the first is the heads where the scores have another axis in front of it, as Swin v2's have.
    """
    alike = is_tensor(factor) and all(size == 1 for size in shape_of(factor)[-2:])
    return alike and (len(shape_of(factor)) != 3 or len(shape_of(scores)) > 3)


def _is_mask(factor: fx.Node, program: Program) -> bool:
    """Whether no parameter has a part in it: 1 where a key is seen, 0 elsewhere; a prefix is seen by all."""
    return all(program.parameter_name(node) is None for node in backward([factor], lambda _: False))
