"""The FFN finder: a linear whose input comes from one or two linears through an activation, joining a residual.

An FFN that reads an attention's result, with no sum in between, need not join one: the two are one branch (Zamba). A
linear that the checkpoint gives a low-rank side path, `W x + B A x`, counts as one (Zamba2).
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.ir.program import Program, is_call, is_getitem, module_path, shape_of
from peftc.ir.sites import Linear, Site, Tap
from peftc.locate.walk import (
    CONVS,
    DROPOUT,
    NONLINEAR,
    NORMS,
    PIECES,
    POINTWISE,
    VIEWS,
    backward,
    common_path,
    inputs_of,
    is_piece,
    is_size,
    reaches,
    skip_back,
)

aten = torch.ops.aten


def find_ffn(program: Program, linears: dict[fx.Node, Linear], attentions: list[Site]) -> list[Site]:
    """Every FFN, in graph order, of linears that belong to none of `attentions`."""
    taken = {linear.node for site in attentions for linear in site.linears.values()}
    outputs = {site.taps["out"].node for site in attentions if "out" in site.taps}
    sites = []
    for down in linears.values():
        if down.node not in taken:
            site = _site(program, down, linears, taken, outputs)
            if site is not None:
                sites.append(site)
    return sites


def _site(
    program: Program,
    down: Linear,
    linears: dict[fx.Node, Linear],
    taken: set[fx.Node],
    outputs: set[fx.Node],
) -> Site | None:
    region = {node for node in backward([down.x], lambda n: n in linears or is_size(n)) if not is_size(node)}
    reached = [node for node in region if node in linears]
    roots = _without_side_paths(reached, linears)
    if not roots or len(roots) > 2 or any(root in taken for root in reached):
        return None
    inner = region - set(reached)
    if not all(_admitted(program, node) for node in inner):
        return None
    if not any(is_call(node, *NONLINEAR) for node in inner):
        return None
    if len({skip_back(linears[root].x) for root in roots}) != 1:
        return None
    up = linears[roots[0]]
    residual = _residual(down.node)
    if residual is None and not _comes_from(up.x, outputs):
        return None
    named = _sources(roots if len(roots) == len(reached) else _sums(roots, inner), inner, down.x)
    if named is None:
        return None
    taps = {"x": Tap("x", up.x), "mid": Tap("mid", down.x), "out": Tap("out", down.node)}
    taps.update({name: Tap(name, node) for name, node in named.items()})
    own = {**_named_linears(named, roots, linears), "down": down} if len(roots) == len(reached) else {}
    missing = {} if "gate" in named else {"gate": "this FFN has no gate"}
    if residual is None:
        missing["residual"] = "this FFN is one branch with the attention before it and joins no residual of its own"
    else:
        taps["residual"] = Tap("residual", residual)
    path = common_path(module_path(node) for node in (*reached, down.node))
    dims: dict[str, int | bool] = {"d_model": up.d_in, "d_ff": down.d_in, "gated": "gate" in named}
    return Site("ffn", path, taps, dims, linears=own, missing=missing, identity=(down.weight_name,))


def _without_side_paths(reached: list[fx.Node], linears: dict[fx.Node, Linear]) -> list[fx.Node]:
    """The linears that read the FFN's own input; one that reads what another made of it is the end of a side path."""
    inputs = {skip_back(linears[node].x) for node in reached}
    return [
        node
        for node in reached
        if (before := linears.get(skip_back(linears[node].x))) is None or skip_back(before.x) not in inputs
    ]


def _sums(roots: list[fx.Node], inner: set[fx.Node]) -> list[fx.Node]:
    """The sums with side paths in the roots' stead."""
    return [user for root in roots for user in root.users if user in inner and is_call(user, aten.add.Tensor)]


def _comes_from(x: fx.Node, outputs: set[fx.Node]) -> bool:
    """Whether a hidden state is made from one of `outputs` by norms, spelled out or not, dropout and views alone."""
    region = backward([x], lambda node: node in outputs or is_size(node))
    found = [node for node in region if node in outputs]
    return bool(found) and all(
        node in outputs or is_size(node) or node.op == "placeholder" or is_call(node, *_TO_NORM) for node in region
    )


_TO_NORM = (
    *VIEWS, *DROPOUT, *NORMS, aten.mul.Tensor, aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default,
    aten.add.Tensor, aten.add.Scalar,
)  # fmt: skip


def _admitted(program: Program, node: fx.Node) -> bool:
    if node.op == "placeholder":  # a per-channel scale, the sub-norm's weight, a number of the activation
        return program.bindings[node].kind != "input"
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return True  # sizes for views, and the tuple of a split
    if is_call(node, *CONVS):
        return _is_depthwise(node)
    if is_call(node, aten.mean.dim):  # of a norm, not of positions
        return node.args[1] in ([-1], [len(shape_of(node)) - 1])
    return is_call(node, *VIEWS, *PIECES, *DROPOUT, *NONLINEAR, *POINTWISE, *NORMS, *_BRANCHES) or is_getitem(node)


_BRANCHES = (
    aten.where.self, aten.where.ScalarOther, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar,
    aten.min.other, aten.max.other, aten.maximum.default, aten.expm1.default, aten.log1p.default, aten.rsqrt.default,
)  # fmt: skip
"""What an activation is made of that is one thing above zero and another below, such as xIELU, and a norm's root."""


def _is_depthwise(conv: fx.Node) -> bool:
    """Whether each channel is convolved by itself: it mixes positions, as in SegFormer's FFN, and no channels."""
    weight = conv.args[1]
    return isinstance(weight, fx.Node) and shape_of(weight)[1] == 1


def _sources(roots: list[fx.Node], inner: set[fx.Node], mid: fx.Node) -> dict[str, fx.Node] | None:
    """The taps `up` and, in a gated FFN, `gate`: the stream with an activation between it and the product."""
    pieces = [node for node in inner if is_piece(node) and skip_back(_origin(node)) in roots]
    streams = _in_order(pieces if pieces else roots)
    if len(streams) == 1:
        return {"up": streams[0]}
    if len(streams) != 2:
        return None
    activated = [s for s in streams if _activated_alone(s, streams, inner)]
    gate = activated[0] if len(activated) == 1 else streams[0]
    return {"gate": gate, "up": next(s for s in streams if s is not gate)}


def _origin(piece: fx.Node) -> fx.Node:
    """What a piece is cut from, through the split it indexes."""
    source = piece.args[0]
    assert isinstance(source, fx.Node)
    if is_getitem(piece):
        source = source.args[0]
        assert isinstance(source, fx.Node)
    return source


def _in_order(nodes: list[fx.Node]) -> list[fx.Node]:
    return sorted(nodes)


def _activated_alone(stream: fx.Node, streams: list[fx.Node], inner: set[fx.Node]) -> bool:
    others = [s for s in streams if s is not stream]
    mine = reaches(stream, inner | {stream})
    shared = set().union(*(reaches(other, inner | {other}) for other in others))
    return any(is_call(node, *NONLINEAR) for node in mine - shared)


def _named_linears(
    named: dict[str, fx.Node], roots: list[fx.Node], linears: dict[fx.Node, Linear]
) -> dict[str, Linear]:
    if "gate" not in named:
        return {"up": linears[roots[0]]}
    if len(roots) == 1:
        return {"gate_up": linears[roots[0]]}
    return {name: linears[node] for name, node in named.items()}


_TO_RESIDUAL = (
    *VIEWS, *DROPOUT, *NORMS, aten.mul.Tensor, aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default,
    aten.add.Tensor, aten.add.Scalar, aten.index.Tensor, aten.div.Tensor,
)  # fmt: skip
"""What an FFN's result may pass on its way to the residual: dropout, a norm (spelled out or not), a scale, a gather,
the division by what a dropped path is kept with."""


def _residual(node: fx.Node) -> fx.Node | None:
    """The stream that the FFN's result is added to, or None when it joins no residual."""
    width = shape_of(node)[-1]
    queue, seen = [node], set()
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        for user in current.users:
            if is_call(user, aten.add.Tensor):
                other = [n for n in inputs_of(user) if n is not current]
                if len(other) == 1 and other[0].op != "placeholder" and shape_of(other[0])[-1:] == (width,):
                    return skip_back(other[0], aten.to.dtype)
                if len(other) > 0:
                    continue  # a sum with something else than a stream; one with a number is passed on
            if is_call(user, *_TO_RESIDUAL):
                queue.append(user)
    return None
