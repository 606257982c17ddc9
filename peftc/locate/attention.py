"""The attention finder: from the attention op back to q, k, v and their projections, forward to W_o."""

from __future__ import annotations

import math

import torch
from torch import fx

from peftc.ir.attention import EagerRegion, FusedRegion, Region, Step
from peftc.ir.program import Program, is_call, is_getitem, module_path, operand, shape_of
from peftc.ir.sites import Layout, Linear, Site, Tap
from peftc.locate.walk import (
    CONVS,
    DROPOUT,
    NORMS,
    POINTWISE,
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
    """Every attention whose queries, keys and values come from linear layers, in graph order."""
    sites = []
    for node in program.graph.nodes:
        region = _region(node, program)
        if region is None:
            continue
        site = _site(region, linears)
        if site is not None:
            sites.append(site)
    return sites


def _region(node: fx.Node, program: Program) -> Region | None:
    if is_call(node, aten.scaled_dot_product_attention.default):
        return FusedRegion(node)
    if is_call(node, aten.softmax.int, aten._softmax.default):
        return _eager_region(node, program)
    return None


_PRODUCTS = (aten.bmm.default, aten.matmul.default)


def _eager_region(softmax: fx.Node, program: Program) -> EagerRegion | None:
    """softmax(.. q kᵀ ..) v, where the product with v follows through views and dropout, and a slice without sinks."""
    if softmax.meta["val"].dim() not in (3, 4):
        return None
    through = (*VIEWS, *DROPOUT, aten.slice.Tensor)
    product = _forward_to(softmax, _PRODUCTS, through)
    if product is None or skip_back(operand(product, 0), *through) is not softmax:
        return None
    logits = _before_shift(operand(softmax, 0))
    scores = _score_product(logits, program)
    heads_out = _heads_value(product)
    if scores is None or heads_out is None:
        return None
    return EagerRegion(softmax, scores[0], product, scores[1], heads_out, logits)


def _before_shift(node: fx.Node) -> fx.Node:
    """The scores themselves, where their row's largest is taken off for the sake of the exponential."""
    shifted = skip_back(node)
    if not is_call(shifted, aten.sub.Tensor) or not isinstance(shifted.args[1], fx.Node):
        return node
    scores, largest = operand(shifted, 0), operand(shifted, 1)
    if is_getitem(largest) and is_call(operand(largest, 0), aten.max.dim):
        largest = operand(largest, 0)
    elif not is_call(largest, aten.amax.default):
        return node
    return scores if operand(largest, 0) is scores else node


def _forward_to(node: fx.Node, targets: tuple[object, ...], through: tuple[object, ...]) -> fx.Node | None:
    queue = list(node.users)
    while queue:
        user = queue.pop(0)
        if is_call(user, *targets):
            return user
        if is_call(user, *through):
            queue.extend(user.users)
    return None


_BESIDE = (
    aten.add.Tensor, aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self, aten.cat.default,
)  # fmt: skip
"""What brings a bias or a mask to the scores, or a column of sinks that no value belongs to."""


def _score_product(logits: fx.Node, program: Program) -> tuple[fx.Node, tuple[Step, ...]] | None:
    """The product q kᵀ that makes the scores, with what else is done to them one by one on the way (see `Step`)."""
    node, steps = logits, []
    for _ in range(32):
        if not isinstance(node, fx.Node):
            return None
        if is_call(node, *_PRODUCTS):
            return node, tuple(reversed(steps))
        if is_call(node, aten.baddbmm.default):
            steps.append((aten.mul.Tensor, (node.kwargs.get("alpha", 1.0),)))
            return node, tuple(reversed(steps))
        if is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
            steps.append((node.target, node.args[1:]))
        elif is_call(node, aten.mul.Tensor):
            factor = _factor(node)
            if factor is None or not (_one_a_head(factor) or _is_mask(factor, program)):
                return None
            if _one_a_head(factor):
                steps.append((node.target, (factor,)))
            node = _operand_with_product(node)
            continue
        elif is_call(node, aten.tanh.default):
            steps.append((node.target, ()))
        elif is_call(node, *_BESIDE):
            node = _operand_with_product(node)
            continue
        elif not is_call(node, *VIEWS):
            return None
        node = node.args[0]
    return None


def _factor(node: fx.Node) -> fx.Node | None:
    """Of a product of the scores with something else, what it is that they are multiplied by."""
    scores = _operand_with_product(node)
    others = [other for other in inputs_of(node) if other is not scores]
    return others[0] if scores is not None and len(others) == 1 else None


def _one_a_head(factor: fx.Node) -> bool:
    """A scale that is the same for every query and key: a prefix's scores are multiplied by it too."""
    return is_tensor(factor) and all(size == 1 for size in shape_of(factor)[-2:]) and len(shape_of(factor)) != 3


def _is_mask(factor: fx.Node, program: Program) -> bool:
    """Whether no parameter has a part in it: 1 where a key is seen, 0 elsewhere; a prefix is seen by all."""
    return all(program.parameter_name(node) is None for node in backward([factor], lambda _: False))


def _operand_with_product(node: fx.Node) -> fx.Node | None:
    for source in inputs_of(node):
        if any(is_call(n, *_PRODUCTS, aten.baddbmm.default) for n in backward([source], _is_product)):
            return source
    return None


def _is_product(node: fx.Node) -> bool:
    return is_call(node, *_PRODUCTS, aten.baddbmm.default, aten.linear.default)


def _heads_value(product: fx.Node) -> fx.Node | None:
    """The product's value as [B, heads, S, head_dim]."""
    node = product
    while node.meta["val"].dim() != 4:
        users = [user for user in node.users if is_call(user, *VIEWS)]
        if len(users) != 1:
            return None
        node = users[0]
    return node


def _site(region: Region, linears: dict[fx.Node, Linear]) -> Site | None:
    query, key, value = _streams(region)
    sources = [_nearest_linear(stream, linears) for stream in (query, key, value)]
    output = _output_linear(region.heads_out, linears)
    if any(source is None for source in sources) or output is None:
        return None
    q_linear, k_linear, v_linear = (source for source in sources if source is not None)
    heads, head_dim = region.head_count, int(shape_of(region.heads_out)[-1])
    key_dim = int(shape_of(query)[-1])
    taps = {"x": Tap("x", q_linear.x), "ctx": _context(v_linear.x), "heads": Tap("heads", region.heads_out)}
    missing: dict[str, str] = {}
    streams = {"q": (query, q_linear), "k": (key, k_linear), "v": (value, v_linear)}
    for name, (stream, linear) in streams.items():
        others = [s for other, (s, source) in streams.items() if other != name and source is linear]
        node = linear.node if not others else _separation(linear.node, stream, others)
        flat = node is linear.node
        layout = None if node is None else "flat" if flat else _layout(node, head_dim if name == "v" else key_dim)
        if node is None or layout is None:
            missing[name] = f"{name} is no single part of the fused projection {module_path(linear.node)}"
        else:
            taps[name] = Tap(name, node, layout)
    taps["concat"] = Tap("concat", output.x)
    taps["out"] = Tap("out", output.node)
    kv_heads = taps["v"].width // head_dim if "v" in taps else heads
    roles = _roles(q_linear, k_linear, v_linear, output)
    dims: dict[str, int | bool] = {
        "d_model": q_linear.d_in, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "key_dim": key_dim,
    }  # fmt: skip
    path = common_path(module_path(linear.node) for linear in roles.values())
    variant = "self" if _same_stream(q_linear.x, v_linear.x) else "cross"
    causal = variant == "self" and _is_causal(region, linears)
    return Site(
        "attention", path, taps, dims, variant=variant, causal=causal, linears=roles, region=region, missing=missing
    )


def _context(node: fx.Node) -> Tap:
    """The input of keys and values; latent attention holds it as one head [B, 1, S, d]."""
    shape = shape_of(node)
    return Tap("ctx", node, "bhsd" if len(shape) == 4 and shape[1] == 1 else "flat")


def _streams(region: Region) -> tuple[fx.Node, fx.Node, fx.Node]:
    query, key, value = region.operands()
    return query, skip_back(key, *VIEWS) if isinstance(region, EagerRegion) else key, value


def _nearest_linear(node: fx.Node, linears: dict[fx.Node, Linear]) -> Linear | None:
    """The linear layer that makes this stream: breadth first through rotary, norms, views, splits."""
    seen, queue = set(), [node]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current in linears:
            return linears[current]
        if is_call(current, aten.embedding.default, aten.softmax.int, aten.scaled_dot_product_attention.default):
            continue
        queue.extend(inputs_of(current))
    return None


def _output_linear(node: fx.Node, linears: dict[fx.Node, Linear]) -> Linear | None:
    """W_o: the first linear layer that the heads reach through views, norms, gates and casts."""
    seen, queue = set(), list(node.users)
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current in linears:
            return linears[current]
        if is_call(current, *VIEWS, *DROPOUT, *NORMS, aten.mul.Tensor, aten.slice.Tensor, aten.cat.default):
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


def _layout(node: fx.Node, head_dim: int) -> Layout | None:
    """How a q, k or v value lies in the graph: flat, or already split into heads."""
    shape = shape_of(node)
    if len(shape) <= 3:
        return "flat"
    if len(shape) != 4 or shape[-1] > head_dim:  # latent attention: a part of each key comes from elsewhere
        return None
    return "bshd" if isinstance(shape[2], int) else "bhsd" if isinstance(shape[1], int) else None


def _roles(q: Linear, k: Linear, v: Linear, o: Linear) -> dict[str, Linear]:
    if q.node is k.node is v.node:
        return {"qkv": q, "o": o}
    if k.node is v.node:
        return {"q": q, "kv": k, "o": o}
    return {"q": q, "k": k, "v": v, "o": o}


def _same_stream(x: fx.Node, ctx: fx.Node) -> bool:
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


def _is_causal(region: Region, linears: dict[fx.Node, Linear]) -> bool:
    """Whether positions are compared with positions on the way to the mask."""
    anchor = region.anchor
    if is_call(anchor, aten.scaled_dot_product_attention.default):
        if (len(anchor.args) > 5 and anchor.args[5]) or anchor.kwargs.get("is_causal"):
            return True
        mask = anchor.args[3] if len(anchor.args) > 3 else anchor.kwargs.get("attn_mask")
        start = [mask] if isinstance(mask, fx.Node) else []
    else:
        start = [anchor]
    return any(is_call(node, *_COMPARISONS) for node in backward(start, lambda n: n in linears))
