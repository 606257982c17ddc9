"""The finder of mixtures of experts: products with stacked weights [experts, .., ..], an activation between them, whose
weighted sum joins a residual.

The site is an FFN by what goes in and comes out. Inside, the hidden values are rows sorted by expert, so it has no
taps there, and no linear layer of its own; a delta beside it or behind it is one for all experts. Where an FFN with
the same input is found (a shared expert), that one is the layer's site: a delta beside it is beside the mixture.
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.ir.program import Program, is_call, module_path, shape_of
from peftc.ir.sites import Site, Tap
from peftc.locate.experts import Stacked, products_before, stacked_products
from peftc.locate.walk import (
    DROPOUT,
    NORMS,
    PIECES,
    POINTWISE,
    VIEWS,
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
    x = _hidden_state(ups[0].data) if ups else None
    joined = None if x is None else _residual(down.node, x)
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


def _hidden_state(node: fx.Node) -> fx.Node | None:
    """Back through the choice of rows to the hidden state [B, S, d] that they are rows of."""
    node = skip_back(node, aten.unsqueeze.default)  # a batched product takes each row as a matrix
    for _ in range(32):
        sizes = shape_of(node)
        if len(sizes) == 3 and not isinstance(sizes[0], int):
            return node
        if not is_call(node, *VIEWS, *PIECES, *_ROWS, aten.mul.Tensor):
            return None
        sources = [source for source in inputs_of(node) if is_tensor(source) and source.meta["val"].is_floating_point()]
        wide = [source for source in sources if shape_of(source)[-1:] == sizes[-1:]]
        if not wide:
            return None
        node = wide[0]
    return None


def _residual(down: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The experts' sum and the stream it is added to; what is made from x, a shared expert, belongs to the sum."""
    hidden, queue, seen = shape_of(x), [down], set[fx.Node]()
    own = _readers(x)
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        for user in current.users:
            others = [n for n in inputs_of(user) if n is not current and is_tensor(n)]
            adds = is_call(user, aten.add.Tensor) and len(others) == 1 and shape_of(current) == hidden
            if adds and others[0] not in own and others[0].op != "placeholder" and shape_of(others[0]) == hidden:
                return current, skip_back(others[0], aten.to.dtype)
            if is_call(user, *_TO_SUM):
                queue.append(user)
    return None


def _readers(x: fx.Node) -> set[fx.Node]:
    """All that is computed from x."""
    found, queue = set[fx.Node](), [x]
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue.extend(node.users)
    return found
