"""The finder of mixtures of experts: products with stacked weights [experts, .., ..], an activation between them, whose
weighted sum joins a residual.

The site is an FFN by what goes in and comes out. Inside, the hidden values are rows sorted by expert, so it has no
taps there, and no linear layer of its own; a delta beside it or behind it is one for all experts. Where an FFN with
the same input is found (a shared expert), that one is the layer's site: a delta beside it is beside the mixture.
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.ir.program import Program, is_call, module_path, operand, shape_of
from peftc.ir.sites import Site, Tap
from peftc.locate.experts import Stacked, products_before, stacked_products
from peftc.locate.walk import (
    DROPOUT,
    NORMS,
    PIECES,
    POINTWISE,
    VIEWS,
    backward,
    common_path,
    inputs_of,
    is_tensor,
    skip_back,
)

aten = torch.ops.aten

_ROWS = (
    aten.index.Tensor, aten.index_select.default, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.gather.default, aten.take_along_dim.default,
)  # fmt: skip
"""Ops that choose rows or repeat them."""

_TO_SUM = (
    *VIEWS, *PIECES, *DROPOUT, *NORMS, *_ROWS, *POINTWISE, aten.sum.dim_IntList, aten.index_add.default,
    aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther, aten.mean.dim, aten.rsqrt.default,
    aten.scatter_add.default, aten.index_put.default, aten.cat.default,
)  # fmt: skip
"""What the experts' results go through on their way to the residual: weights, the sum over experts, norms."""


def find_mixtures(program: Program, ffns: list[Site]) -> list[Site]:
    """Every mixture of experts that has no shared expert among `ffns`, in graph order."""
    stacked = stacked_products(program)
    taken = {skip_back(site.taps["x"].node) for site in ffns}
    sites: dict[fx.Node, Site] = {}
    for down in stacked.values():
        site = _site(down, products_before(down, stacked))
        if site is not None and skip_back(site.taps["x"].node) not in taken:
            sites.setdefault(site.taps["out"].node, site)
    return list(sites.values())


def _site(down: Stacked, ups: list[Stacked]) -> Site | None:
    x, projected = _hidden_state(ups[0].data) if ups else (None, False)
    joined = None if x is None else _residual(down.node, x, (*_TO_SUM, *_PROJECTION) if projected else _TO_SUM)
    if x is None or joined is None:
        return None
    out, residual = joined
    gated = len(ups) > 1 or ups[0].d_out == 2 * down.d_in
    path = common_path([module_path(down.node), module_path(out)])
    why = "the hidden values of a mixture are rows sorted by expert"
    return Site(
        "ffn",
        path,
        {"x": Tap("x", x), "out": Tap("out", out), "residual": Tap("residual", residual)},
        {"d_model": int(shape_of(x)[-1]), "d_ff": down.d_in, "gated": gated},
        missing=dict.fromkeys(("gate", "up", "mid"), why),
    )


_PROJECTION = (aten.linear.default,)


def _hidden_state(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """Back through the choice of rows to the hidden state [B, S, d] that they are rows of, and whether a projection
    of the mixture's own, with its norm, comes in between (Muse Spark).
    """
    node = skip_back(node, aten.unsqueeze.default)  # a batched product takes each row as a matrix
    projected = False
    for _ in range(32):
        sizes = shape_of(node)
        if len(sizes) == 3 and not isinstance(sizes[0], int):
            return node, projected
        if is_call(node, *_PROJECTION) and not projected:
            projected, node = True, operand(node, 0)
            continue
        if not is_call(node, *VIEWS, *PIECES, *_ROWS, aten.mul.Tensor):
            return None, projected
        sources = [source for source in inputs_of(node) if is_tensor(source) and source.meta["val"].is_floating_point()]
        wide = [source for source in sources if shape_of(source)[-1:] == sizes[-1:]]
        if not wide:
            return None, projected
        node = max(wide, key=lambda source: len(shape_of(source)))  # not the weight of a norm
    return None, projected


def _residual(down: fx.Node, x: fx.Node, onward: tuple[object, ...]) -> tuple[fx.Node, fx.Node] | None:
    """The experts' sum and the stream it is added to; what is made from x, a shared expert, belongs to the sum.

    The sum is taken as it leaves the mixture, before a norm or a scale on the way to the stream.
    """
    hidden, queue = shape_of(x), [down]
    before: dict[fx.Node, fx.Node | None] = {down: None}
    own = _readers(x)
    while queue:
        current = queue.pop(0)
        for user in current.users:
            others = [n for n in inputs_of(user) if n is not current and is_tensor(n)]
            adds = is_call(user, aten.add.Tensor) and len(others) == 1 and shape_of(current) == hidden
            if adds and shape_of(others[0]) == hidden and _is_stream(others[0], x, own):
                return _as_it_left(current, before, hidden), skip_back(others[0], aten.to.dtype)
            if user not in before and is_call(user, *onward):
                before[user] = current
                queue.append(user)
    return None


def _is_stream(node: fx.Node, x: fx.Node, own: set[fx.Node]) -> bool:
    """Whether a value is not made from x alone: it is x itself, scaled or not, or comes from beyond x too.

    Beside x an attention may read it (Cohere 2), so that what it is added to depends on x as well.
    """
    if node not in own:
        return node.op != "placeholder"
    scaled = node
    while scaled is not x and is_call(scaled, *VIEWS, aten.mul.Tensor) and len(inputs_of(scaled)) == 1:
        scaled = operand(scaled, 0)
    if scaled is x:
        return True
    hidden = shape_of(x)
    seen = backward([node], lambda n: n is x or n not in own)
    return any(n not in own and is_tensor(n) and n.op != "placeholder" and shape_of(n) == hidden for n in seen)


def _as_it_left(node: fx.Node, before: dict[fx.Node, fx.Node | None], hidden: tuple[object, ...]) -> fx.Node:
    """The first value of the hidden state's shape on the way to `node`, or the last sum with a shared expert."""
    while (previous := before[node]) is not None and shape_of(previous) == hidden:
        others = [n for n in inputs_of(node) if n is not previous and is_tensor(n)]
        if is_call(node, aten.add.Tensor) and any(shape_of(other) == hidden for other in others):
            break
        node = previous
    return node


def _readers(x: fx.Node) -> set[fx.Node]:
    """All that is computed from x."""
    found, queue = set[fx.Node](), [x]
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue.extend(node.users)
    return found
