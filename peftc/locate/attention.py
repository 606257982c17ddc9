"""The attention finder: from the attention op back to q, k, v and their projections, forward to W_o."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from peftc.ir.program import Program, is_call, is_getitem, module_path, operand, shape_of
from peftc.ir.sites import Layout, Linear, Site, Tap
from peftc.locate.parting import columns, split_heads
from peftc.locate.projections import Projection, Projections, find_projections
from peftc.locate.regions import Found, find_softmaxes
from peftc.locate.streams import is_causal, same_stream
from peftc.locate.walk import (
    DROPOUT,
    NORMS,
    PIECES,
    VIEWS,
    backward,
    common_path,
    inputs_of,
    is_tensor,
    reaches,
    skip_back,
)

aten = torch.ops.aten


def find_attention(program: Program, linears: dict[fx.Node, Linear]) -> list[Site]:
    """Every attention whose queries, keys and values come from projections, in graph order.

    Several softmaxes over the queries and keys of the same projections are one attention.
    """
    projections = find_projections(program, linears)
    groups: dict[tuple[object, ...], list[_Attention]] = {}
    for found in find_softmaxes(program):
        one = _attention(program, found, projections)
        if one is not None:
            key = (one.q.node, one.k.node, one.v.node, one.output.weight_name)
            groups.setdefault(key, []).append(one)
    return [_site(program, several, projections) for several in groups.values()]


@dataclass(frozen=True, slots=True)
class _Attention:
    """A softmax over keys with the projections around it."""

    found: Found
    q: Projection
    k: Projection
    v: Projection
    output: Projection

    @property
    def heads(self) -> int:
        return self.output.input_tap("concat").width // self.found.width


def _attention(program: Program, found: Found, projections: Projections) -> _Attention | None:
    q, k, v = (next(_sources(stream, projections), None) for stream in (found.query, found.key, found.value))
    output = _output(program, found.products, projections)
    if q is None or k is None or v is None or output is None:
        return None
    if q is k and _separation(q.node, found.query, [found.key]) is None:
        q, k = _by_width(found.query, projections) or q, _by_width(found.key, projections) or k
    return _Attention(found, q, k, _whole(v, found.value), output)


def _site(program: Program, several: list[_Attention], projections: Projections) -> Site:
    one, found = several[0], several[0].found
    missing: dict[str, str] = {}
    taps = {"x": one.q.input_tap("x"), "ctx": _context(one.v)}
    heads, axis = _heads(program, one), 1
    why = found.split or (_SEVERAL if len(several) > 1 else "")
    if heads is None and not why:
        heads, axis = split_heads(program, one.output, found.product, one.heads)
        why = "" if heads is not None else "the heads' results are not what the output projection reads"
    if heads is None or why:
        missing["heads"] = why
    else:
        taps["heads"] = Tap("heads", heads)
    head_dim, key_dim = found.width, int(shape_of(found.query)[-1])
    taps.update(_projected(program, one, head_dim, key_dim, missing))
    outputs = {each.output.node: each.output for each in several}
    if len(outputs) == 1:
        taps.update(concat=one.output.input_tap("concat"), out=one.output.output_tap("out"))
    else:
        missing.update(dict.fromkeys(("concat", "out"), "this attention ends in two calls of its output projection"))
    count = one.heads if heads is None else int(shape_of(heads)[1])
    if "concat" in taps and taps["concat"].width != count * head_dim:
        missing["concat"] = "its output projection reads products of groups of heads, not the heads merged"
        del taps["concat"]
    kv_heads = _kv_heads(one, taps, count)
    dims: dict[str, int | bool] = {
        "d_model": one.q.d_in, "heads": count, "kv_heads": kv_heads, "head_dim": head_dim, "key_dim": key_dim,
    }  # fmt: skip
    path = common_path(module_path(part.node) for part in (one.q, one.k, one.v, one.output))
    variant = "self" if same_stream(one.q.x, one.v.x) else "cross"
    return Site(
        "attention",
        path,
        taps,
        dims,
        variant=variant,
        causal=variant == "self" and is_causal(found.anchor, projections),
        linears=_roles(one),
        region=found.region(heads, axis) if "heads" in taps and heads is not None else None,
        missing=missing,
        identity=tuple(part.weight_name for part in (one.q, one.k, one.v, one.output)),
    )


_SEVERAL = "this attention has several softmaxes over the same projections, and no value holds the heads of them all"


def _projected(
    program: Program, one: _Attention, head_dim: int, key_dim: int, missing: dict[str, str]
) -> dict[str, Tap]:
    """The taps q, k and v; of a fused projection the parts, where each is a part by itself."""
    streams = {"q": (one.found.query, one.q), "k": (one.found.key, one.k), "v": (one.found.value, one.v)}
    taps: dict[str, Tap] = {}
    parts: dict[str, fx.Node | None] = {}
    for name, (stream, projection) in streams.items():
        others = [s for other, (s, source) in streams.items() if other != name and source is projection]
        if others:
            parts[name] = _separation(projection.node, stream, others)
        else:
            taps[name] = projection.output_tap(name)
    fused = {name: streams[name][1].node for name in parts}
    widths = {name: head_dim if name == "v" else key_dim for name in parts}
    layouts: dict[str, Layout | None] = {
        n: _layout(part, fused[n], widths[n]) for n, part in parts.items() if part is not None
    }
    if len(set(fused.values())) == 1 and len(layouts) == len(parts) and None in layouts.values():
        found = columns(program, next(iter(fused.values())), [part for part in parts.values() if part is not None])
        if found is not None:
            parts = {**dict(zip(parts, found, strict=True))}
            layouts = dict.fromkeys(parts, "flat")
    for name, node in parts.items():
        layout = layouts.get(name)
        if node is None or layout is None:
            missing[name] = f"{name} is no single part of the fused projection {module_path(streams[name][1].node)}"
        else:
            taps[name] = Tap(name, node, layout)
    return taps


_REPEATING = (
    aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default,
    aten.clone.default, aten.contiguous.default, aten.repeat_interleave.self_int,
)  # fmt: skip


def _kv_heads(one: _Attention, taps: dict[str, Tap], heads: int) -> int:
    """As many as the values are wide; where no tap holds them, as many as they are before each is repeated."""
    if "v" in taps:
        return taps["v"].width // one.found.width
    node, found = one.found.value, heads
    while True:
        shape = shape_of(node)
        if len(shape) == 4 and isinstance(shape[1], int) and shape[-1] == one.found.width:
            found = min(found, shape[1])
        if not is_call(node, *_REPEATING):
            return found
        node = operand(node, 0)


def _heads(program: Program, one: _Attention) -> fx.Node | None:
    """The product's value as [B, heads, S, head_dim], where the graph holds it; an image's has two axes for S."""
    node = one.found.product
    if len(shape_of(node)) > 4:
        return None
    while len(shape_of(node)) != 4:
        users = [user for user in node.users if is_call(user, *VIEWS)]
        if len(users) != 1:
            return None
        node = users[0]
    return node if shape_of(node)[-1] == one.found.width else None


def _context(v: Projection) -> Tap:
    """The input of keys and values; latent attention holds it as one head [B, 1, S, d]."""
    shape = shape_of(v.x)
    return Tap("ctx", v.x, "bhsd") if len(shape) == 4 and shape[1] == 1 else v.input_tap("ctx")


def _sources(node: fx.Node, projections: Projections) -> Iterator[Projection]:
    """The projections that make this stream, nearest first: breadth first through rotary, norms, views, splits."""
    seen, queue = set[fx.Node](), [node]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current in projections:
            yield projections[current]
        elif not is_call(current, aten.embedding.default, aten.softmax.int, aten.scaled_dot_product_attention.default):
            queue.extend(inputs_of(current))


def _by_width(stream: fx.Node, projections: Projections) -> Projection | None:
    """Of the projections that are mixed into a stream, as by a convolution over q and k, the one that is as wide."""
    sizes = shape_of(skip_back(stream, *VIEWS, aten.slice.Tensor))
    if len(sizes) != 4 or not isinstance(sizes[1], int):
        return None
    found = [one for one in _sources(stream, projections) if one.output_tap("").width == sizes[1] * sizes[3]]
    return found[0] if len(found) == 1 else None


def _whole(v: Projection, stream: fx.Node) -> Projection:
    """The values as one, where several projections side by side make them."""
    joined = skip_back(stream, *VIEWS, aten.slice.Tensor)
    if not is_call(joined, aten.cat.default) or len(shape_of(joined)) != 3 or joined.args[1:] not in ((-1,), (2,)):
        return v
    return replace(v, node=joined, linear=None) if v.node in joined.all_input_nodes else v


_MERGING = (*VIEWS, *DROPOUT, *NORMS, *PIECES, aten.mul.Tensor, aten.cat.default, aten.sub.Tensor)


def _output(program: Program, products: tuple[fx.Node, ...], projections: Projections) -> Projection | None:
    """W_o: the first projection that the heads reach through views, norms, gates, differences of heads, casts, and
    products of groups of heads with a weight.
    """
    seen, queue = set[fx.Node](), [user for product in products for user in product.users]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current in projections:
            return projections[current]
        whole = is_call(current, aten.add.Tensor) and all(source in products for source in inputs_of(current))
        grouped = is_call(current, aten.bmm.default) and program.parameter_name(skip_back(operand(current, 1)))
        if whole or grouped or is_call(current, *_MERGING) or is_getitem(current):
            queue.extend(current.users)
    return None


def _separation(linear: fx.Node, stream: fx.Node, others: list[fx.Node]) -> fx.Node | None:
    """In a fused projection, the node where this stream parts from the others: a linear selection of the output."""
    own = _between(linear, stream)
    shared: set[fx.Node] = set().union(*(_between(linear, other) for other in others))
    first = [n for n in own if n not in shared and any(p in shared for p in inputs_of(n) if p in own)]
    return first[0] if len(first) == 1 and is_tensor(first[0]) else None


def _between(source: fx.Node, sink: fx.Node) -> set[fx.Node]:
    within = set(backward([sink], lambda node: node is source))
    return reaches(source, within)


def _layout(node: fx.Node, fused: fx.Node, head_dim: int) -> Layout | None:
    """How a part of a fused projection lies in the graph, where its axes are the projection's own: flat, or already
    split into heads; the length is the one that the projection has rows of. None where they tell nothing, as of the
    windows of an image, or of keys with others behind them (DeepSeek V4).
    """
    shape, rows = shape_of(node), [str(size) for size in shape_of(fused)[:-1]]
    rows = [rows[0], rows[2]] if len(rows) == 3 and rows[1] == "1" else rows  # latent attention's one head
    if len(shape) <= 3:
        return "flat" if [str(size) for size in shape[:-1]] == rows else None
    if len(shape) != 4 or len(rows) != 2 or shape[-1] > head_dim:  # latent attention: a part of a key from elsewhere
        return None
    length = [str(size) == rows[1] for size in shape[1:3]]
    layouts: dict[tuple[bool, ...], Layout] = {(True, False): "bshd", (False, True): "bhsd"}
    return layouts.get(tuple(length)) if str(shape[0]) == rows[0] else None


def _roles(one: _Attention) -> dict[str, Linear]:
    """The linear layers among the projections by their roles."""
    if one.q.node is one.k.node is one.v.node:
        named = {"qkv": one.q, "o": one.output}
    elif one.k.node is one.v.node:
        named = {"q": one.q, "kv": one.k, "o": one.output}
    else:
        named = {"q": one.q, "k": one.k, "v": one.v, "o": one.output}
    return {role: part.linear for role, part in named.items() if part.linear is not None}
