"""Single-op sites: linear, embedding, conv and norm layers, each an op with a parameter of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from peftc.ir.program import Program, is_call, module_path, shape_of
from peftc.ir.sites import Linear, Site, Tap
from peftc.locate.walk import CONVS, NORMS, backward, first_input, inputs_of, skip_back

aten = torch.ops.aten


def find_plain(program: Program, linears: dict[fx.Node, Linear]) -> list[Site]:
    """Linear, embedding, conv and norm sites in graph order."""
    sites: list[Site] = []
    for node in program.graph.nodes:
        if node in linears:
            sites.append(_linear_site(linears[node]))
        elif is_call(node, aten.embedding.default):
            sites.extend(_parameter_site(program, "embedding", node, weight=0, bias=None, x=None))
        elif is_call(node, *CONVS):
            sites.extend(_parameter_site(program, "conv", node, weight=1, bias=2, x=0))
        elif is_call(node, *NORMS):
            sites.extend(_norm_site(program, node))
        elif is_call(node, aten.mul.Tensor):
            sites.extend(_rms_norm_site(program, node))
    return sites


def _linear_site(linear: Linear) -> Site:
    taps = {"x": Tap("x", linear.x), "out": Tap("out", linear.node)}
    layout = "transposed" if linear.transposed else "flat"
    taps["weight"] = Tap("weight", linear.weight, layout, user=_consumer(linear))
    missing = {}
    if linear.bias is not None:
        taps["bias"] = Tap("bias", linear.bias, user=linear.node)
    else:
        missing["bias"] = "this linear layer has no bias"
    dims = {"d_in": linear.d_in, "d_out": linear.d_out, "has_bias": linear.bias is not None}
    return Site("linear", module_path(linear.node), taps, dims, linears={"out": linear}, missing=missing, role="other")


def _consumer(linear: Linear) -> fx.Node:
    """The node that reads the weight placeholder: the linear itself, or the transpose in front of it."""
    operand, consumer = linear.weight_operand, linear.node
    while operand is not linear.weight:
        consumer, operand = operand, first_input(operand)
    return consumer


def _parameter_site(
    program: Program, kind: str, node: fx.Node, *, weight: int, bias: int | None, x: int | None
) -> Iterator[Site]:
    def operand(index: int | None) -> fx.Node | None:
        value = node.args[index] if index is not None and len(node.args) > index else None
        return value if isinstance(value, fx.Node) else None

    table = operand(weight)
    if table is None or program.parameter_name(table) is None:
        return
    taps = {"weight": Tap("weight", table, user=node), "out": Tap("out", node)}
    data = operand(x)
    if data is not None:
        taps["x"] = Tap("x", data)
    missing = {}
    offset = operand(bias)
    if offset is not None and program.parameter_name(offset) is not None:
        taps["bias"] = Tap("bias", offset, user=node)
    elif bias is not None:
        missing["bias"] = f"this {kind} layer has no bias"
    dims: dict[str, int | bool] = {
        "has_bias": "bias" in taps,
        "d_out": int(shape_of(table)[-1 if kind != "conv" else 0]),
    }
    yield Site(kind, module_path(node), taps, dims, missing=missing)


def _norm_site(program: Program, node: fx.Node) -> Iterator[Site]:
    index = {"group_norm": 2, "batch_norm": 1}.get(node.target.overloadpacket.__name__, 2)  # type: ignore[union-attr]
    bias = None if is_call(node, aten.rms_norm.default) else index + 1
    yield from _parameter_site(program, "norm", node, weight=index, bias=bias, x=0)


def _rms_norm_site(program: Program, node: fx.Node) -> Iterator[Site]:
    """weight * x * rsqrt(mean(x^2) + eps), as most decoders spell it."""
    weights = [n for n in inputs_of(node) if program.parameter_name(n) and n.meta["val"].dim() == 1]
    others = [n for n in inputs_of(node) if n not in weights]
    if len(weights) != 1 or len(others) != 1:
        return
    scaled = skip_back(others[0])
    if not is_call(scaled, aten.mul.Tensor):
        return
    rsqrt = [n for n in inputs_of(scaled) if is_call(skip_back(n), aten.rsqrt.default)]
    data = [n for n in inputs_of(scaled) if n not in rsqrt]
    if len(rsqrt) != 1 or len(data) != 1 or skip_back(data[0]) not in backward(rsqrt, lambda n: n.op == "placeholder"):
        return
    taps = {
        "x": Tap("x", skip_back(data[0])),
        "weight": Tap("weight", weights[0], user=node),
        "out": Tap("out", node),
    }
    dims: dict[str, int | bool] = {"d_out": int(shape_of(weights[0])[-1]), "has_bias": False}
    yield Site("norm", module_path(node), taps, dims, missing={"bias": "an RMS norm has no bias"})
