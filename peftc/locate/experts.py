"""The finder of stacked experts: the parameters [experts, ..] of a mixture, each a weight or bias for every expert.

A *stacked product* multiplies rows with the weights of their experts: a grouped product, which takes the whole stack
and where each expert's rows end, or a batched one, of the whole stack or of the entries that a router's choice picks.
The products before an activation are those of gate and up, the one that takes its result is that of down.

    gate_up = grouped_mm(rows, transpose(W_gate_up), ends)      # W_gate_up: [experts, 2 d_ff, d_model]
    out = grouped_mm(silu(gate) * up, transpose(W_down), ends)  # W_down: [experts, d_model, d_ff]

A checkpoint may store a weight as [experts, in, out]: the order is read from the product, and the taps have it turned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftc.ir.program import Program, is_call, is_getitem, module_path, shape_of
from peftc.ir.sites import Site, Tap
from peftc.locate.walk import (
    DROPOUT,
    NONLINEAR,
    PIECES,
    POINTWISE,
    VIEWS,
    backward,
    common_path,
    first_input,
    is_size,
)

aten = torch.ops.aten

_TURNS = (aten.transpose.int, aten.permute.default)
_PICKS = (aten.index.Tensor, aten.index_select.default)
_AS_IT_IS = (
    aten.to.dtype, aten.to.device, aten._to_copy.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.detach.default,
)  # fmt: skip


_INSIDE = (*VIEWS, *PIECES, *DROPOUT, *NONLINEAR, *POINTWISE)
"""What may stand between the products before an activation and the one behind it: no row is chosen, none are summed."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """A product with a stack of weights: its node, the rows it takes, and the parameter as it is read."""

    node: fx.Node
    data: fx.Node
    weight: Tap

    @property
    def d_in(self) -> int:
        return int(self.weight.canonical_shape[2])  # pyright: ignore[reportArgumentType]

    @property
    def d_out(self) -> int:
        return int(self.weight.canonical_shape[1])  # pyright: ignore[reportArgumentType]


def stacked_products(program: Program) -> dict[fx.Node, Stacked]:
    """Every product with a stack of weights [experts, .., ..], by node, in graph order."""
    found = ((node, _product(program, node)) for node in program.graph.nodes)
    return {node: product for node, product in found if product is not None}


def find_experts(program: Program) -> list[Site]:
    """The stacked parameters of every mixture of experts, a site each, in graph order."""
    products = stacked_products(program)
    sites: list[Site] = []
    for down in products.values():
        ups = products_before(down, products)
        if ups:
            sites.append(_site(program, down, ups))
    return sites


def products_before(down: Stacked, products: dict[fx.Node, Stacked]) -> list[Stacked]:
    """The stacked products that `down` takes the result of, through an activation; in graph order."""
    region = set(backward([down.data], lambda node: not (is_call(node, *_INSIDE) or is_getitem(node))))
    ups = [product for node, product in products.items() if node in region]
    return ups if any(is_call(node, *NONLINEAR) for node in region) else []


def _product(program: Program, node: fx.Node) -> Stacked | None:
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    if node.op != "call_function" or not (name in ("bmm", "matmul") or "grouped_mm" in name):
        return None
    operands = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    taps = [_weight(program, operand, node, first=index == 0) for index, operand in enumerate(operands)]
    if len(operands) != 2 or sum(tap is not None for tap in taps) != 1:
        return None
    weight = taps[0] or taps[1]
    assert weight is not None
    return Stacked(node, operands[1] if weight is taps[0] else operands[0], weight)


def _weight(program: Program, operand: fx.Node, reader: fx.Node, *, first: bool) -> Tap | None:
    """The stack that an operand of a product is; as first operand, W x, it stands as [out, in], else as [in, out]."""
    turned, node = not first, operand
    while is_call(node, *_AS_IT_IS, *_PICKS, *_TURNS):
        if is_call(node, *_TURNS) and not _swaps_matrix_axes(node):
            return None
        if is_call(node, *_PICKS) and not _picks_along_first_axis(node):
            return None
        turned = turned != is_call(node, *_TURNS)
        node, reader = first_input(node), node
    if program.parameter_name(node) is None or node.meta["val"].dim() != 3:
        return None
    return Tap("weight", node, "transposed" if turned else "flat", user=reader, stacked=True)


def _swaps_matrix_axes(node: fx.Node) -> bool:
    """Whether a transpose or permutation of [experts, a, b] gives [experts, b, a]."""
    axes = node.args[1:]
    if is_call(node, aten.permute.default):
        order = axes[0]
        return isinstance(order, (list, tuple)) and [axis % 3 for axis in order if isinstance(axis, int)] == [0, 2, 1]
    return {axis % 3 for axis in axes if isinstance(axis, int)} == {1, 2}


def _picks_along_first_axis(node: fx.Node) -> bool:
    if is_call(node, aten.index_select.default):
        return isinstance(node.args[1], int) and node.args[1] == 0
    indices = node.args[1]
    return isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], fx.Node)


def _site(program: Program, down: Stacked, ups: list[Stacked]) -> Site:
    named = {**_named(down, ups), "down": down}
    taps: dict[str, Tap] = {}
    biases: dict[str, Tap] = {}
    for name, product in named.items():
        taps[name] = _renamed(product.weight, name)
        bias = _bias(program, product)
        if bias is not None:
            biases[f"{name}_bias"] = _renamed(bias, f"{name}_bias")
    dims: dict[str, int | bool] = {
        "experts": int(shape_of(down.weight.node)[0]), "d_model": down.d_out, "d_ff": down.d_in,
        "has_bias": bool(biases),
    }  # fmt: skip
    path = common_path(module_path(product.node) for product in named.values())
    identity = tuple(tap.node.name for tap in taps.values())
    return Site("experts", path, {**taps, **biases}, dims, missing=_missing(named, biases), identity=identity)


def _renamed(tap: Tap, name: str) -> Tap:
    return Tap(name, tap.node, tap.layout, user=tap.user, stacked=True)


def _named(down: Stacked, ups: list[Stacked]) -> dict[str, Stacked]:
    """The products before the activation by what they are: a gate is what the activation itself is of."""
    if len(ups) == 1:
        return {"gate_up" if ups[0].d_out == 2 * down.d_in else "up": ups[0]}
    nodes = {up.node for up in ups}
    region = backward([down.data], lambda node: node in nodes or is_size(node))
    activated = backward([node for node in region if is_call(node, *NONLINEAR)], lambda node: node in nodes)
    gates = [up for up in ups if up.node in activated]
    rest = [up for up in ups if up.node not in activated]
    return {"gate": gates[0], "up": rest[0]} if len(gates) == len(rest) == 1 else {"up": ups[0]}


def _missing(named: dict[str, Stacked], biases: dict[str, Tap]) -> dict[str, str]:
    missing: dict[str, str] = {}
    if "gate_up" in named:
        missing |= dict.fromkeys(("gate", "up"), "gate and up are one weight here, `gate_up`")
        missing |= dict.fromkeys(("gate_bias", "up_bias"), "gate and up have one bias here, `gate_up_bias`")
    else:
        missing["gate_up"] = "gate and up are weights of their own here" if "gate" in named else "there is no gate here"
        missing["gate_up_bias"] = missing["gate_up"]
    if "gate" not in named:
        missing.setdefault("gate", "there is no gate here")
        missing.setdefault("gate_bias", "there is no gate here")
    absent = [f"{name}_bias" for name in named if f"{name}_bias" not in biases]
    return {**missing, **dict.fromkeys(absent, "these experts have no bias")}


def _bias(program: Program, product: Stacked) -> Tap | None:
    """The bias that is added to the product, picked for each row by its expert: [experts, out]."""
    node = product.node
    while len(node.users) == 1 and is_call(next(iter(node.users)), *VIEWS):
        node = next(iter(node.users))
    for user in node.users:
        if not is_call(user, aten.add.Tensor):
            continue
        for other in (argument for argument in user.args if isinstance(argument, fx.Node) and argument is not node):
            reader = user
            while is_call(other, *_AS_IT_IS, *_PICKS):
                other, reader = first_input(other), other
            sizes = shape_of(other) if program.parameter_name(other) is not None else ()
            if sizes == (shape_of(product.weight.node)[0], product.d_out):
                return Tap("bias", other, user=reader, stacked=True)
    return None
