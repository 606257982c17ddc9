"""normalize: bring every family's trace to few op shapes, so that the locator has little to know.

- metadata assertions of the tracer are dropped;
- view -> addmm -> view (a linear layer with its weight stored [in, out], GPT-2's Conv1D) becomes
  `linear(x, transpose(W))`: the transpose records the layout;
- `matmul(x, transpose(W))` (Falcon) becomes `linear(x, W)`;
- an op that writes into a value of the graph (`add_`) becomes the one that makes a new value, where nothing else
  shares the memory;
- integers that `histc` counts become floats, which it counts on the CPU too;
- a weight times turned rows, W xᵀ (Mamba's step sizes), becomes the linear layer that it is;
- an einsum that is a product of matrices becomes one, and attention with the sequence in front of the batch becomes one
  with the batch in front; attentions with the same weights and other values become one with longer values;
- a value made empty and then filled piece by piece becomes the `cat` of its pieces;
- what nothing uses any more is removed.

The graph computes the same values before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from peftc.ir.builder import Builder
from peftc.ir.program import Program, is_call, is_getitem, operand, shape_of
from peftc.locate.batch_first import batch_first
from peftc.locate.einsum import einsum_to_matmul
from peftc.locate.twins import join_twins
from peftc.locate.walk import PIECES, VIEWS

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Normalize:
    """See the module docstring."""

    name: ClassVar[str] = "normalize"

    def apply(self, program: Program) -> None:
        graph = program.graph
        for node in list(graph.nodes):
            if is_call(node, aten._assert_tensor_metadata.default) or _is_runtime_assert(node):
                graph.erase_node(node)
        for node in list(graph.nodes):
            if is_call(node, aten.addmm.default):
                _addmm_to_linear(program, node)
            elif is_call(node, aten.matmul.default):
                first = program.parameter_name(operand(node, 0)) is not None
                (_weight_first_to_linear if first else _matmul_to_linear)(program, node)
            elif is_call(node, aten.einsum.default):
                einsum_to_matmul(program, node)
            elif is_call(node, aten.histc.default):
                _count_as_float(program, node)
            elif node.op == "call_function":
                _in_place_to_new(node)
        for node in list(graph.nodes):
            if is_call(node, aten.new_empty.default, aten.empty.memory_format):
                _pieces_to_cat(program, node)
        graph.eliminate_dead_code(_is_kept)
        batch_first(program)
        join_twins(program)
        graph.eliminate_dead_code(_is_kept)


def _is_kept(node: fx.Node) -> bool:
    """Whether a node does something besides its value. Dropout of a value that nothing reads does not: a stream that
    the last layer computes for no one (LiLT, PEGASUS-X) would look like a place for deltas.
    """
    return node.is_impure(impure_random=False)


def _is_runtime_assert(node: fx.Node) -> bool:
    return is_call(node, aten._assert_scalar.default, aten._assert_async.msg)


def _addmm_to_linear(program: Program, node: fx.Node) -> None:
    bias, flat, weight = node.args[:3]
    if node.kwargs or not all(isinstance(arg, fx.Node) for arg in (bias, flat, weight)):
        return
    assert isinstance(flat, fx.Node) and isinstance(weight, fx.Node)
    if program.parameter_name(weight) is None or not is_call(flat, aten.view.default, aten.reshape.default):
        return
    unflatten = next(iter(node.users))
    if len(node.users) != 1 or not is_call(unflatten, aten.view.default, aten.reshape.default):
        return
    x = flat.args[0]
    assert isinstance(x, fx.Node)
    if shape_of(x)[:-1] != shape_of(unflatten)[:-1]:
        return
    builder = Builder(program, unflatten, label="", like=node)
    linear = builder.call(aten.linear.default, x, builder.call(aten.transpose.int, weight, 0, 1), bias)
    for written in builder.nodes:
        written.meta.pop("custom")
    unflatten.replace_all_uses_with(linear)
    for dead in (unflatten, node):
        program.graph.erase_node(dead)


def _weight_first_to_linear(program: Program, node: fx.Node) -> None:
    """`matmul(W, transpose(x, 1, 2))` to `transpose(linear(x, W), 1, 2)`."""
    weight, turned = operand(node, 0), operand(node, 1)
    is_weight = program.parameter_name(weight) is not None and weight.meta["val"].dim() == 2
    if not is_weight or not is_call(turned, aten.transpose.int) or turned.meta["val"].dim() != 3:
        return
    if {axis % 3 for axis in turned.args[1:]} != {1, 2}:  # pyright: ignore[reportOperatorIssue]
        return
    builder = Builder(program, node.prev, label="", like=node)
    value = builder.call(aten.linear.default, operand(turned, 0), weight)
    value = builder.call(aten.transpose.int, value, 1, 2)
    for written in builder.nodes:
        written.meta.pop("custom")
    node.replace_all_uses_with(value)
    program.graph.erase_node(node)


_TURNED = (aten.numpy_T.default, aten.t.default, aten.mT.default, aten.transpose.int, aten.permute.default)


def _matmul_to_linear(program: Program, node: fx.Node) -> None:
    x, turned = node.args
    if not isinstance(turned, fx.Node) or not is_call(turned, *_TURNED):
        return
    weight = turned.args[0]
    assert isinstance(weight, fx.Node) and isinstance(x, fx.Node)
    if program.parameter_name(weight) is None or shape_of(turned) != shape_of(weight)[::-1] or len(shape_of(x)) < 2:
        return
    if is_call(turned, aten.permute.default) and turned.args[1] == [0, 1]:
        return
    builder = Builder(program, node, label="", like=node)
    linear = builder.call(aten.linear.default, x, weight)
    linear.meta.pop("custom")
    node.replace_all_uses_with(linear)
    program.graph.erase_node(node)


def _count_as_float(program: Program, node: fx.Node) -> None:
    """`histc` counts floats on every device, and integers on CUDA alone: a mixture's experts are numbers below 2^24."""
    counted = node.args[0]
    assert isinstance(counted, fx.Node)
    if counted.meta["val"].is_floating_point():
        return
    builder = Builder(program, node.prev, label="", like=node)
    floats = builder.call(aten.to.dtype, counted, torch.float32)
    floats.meta.pop("custom")
    node.replace_input_with(counted, floats)
    with program.fake_mode:
        node.meta["val"] = node.meta["val"].to(torch.float32)


def _pieces_to_cat(program: Program, empty: fx.Node) -> None:
    """`e = empty(..); e[.., :a] = x; e[.., a:] = y` to `cat([x, y])`, where the pieces are all of e."""
    slices = [user for user in empty.users if is_call(user, aten.slice.Tensor)]
    writes = [user for part in slices for user in part.users if is_call(user, aten.copy_.default)]
    if (
        not slices
        or len(writes) != len(slices)
        or any(len(part.users) != 1 or writes[i].users for i, part in enumerate(slices))
    ):
        return
    axes: set[Any] = {part.args[1] if len(part.args) > 1 else 0 for part in slices}  # pyright: ignore[reportUnhashable]
    sources = [write.args[1] for write in writes]
    shapes_agree = all(
        isinstance(s, fx.Node) and shape_of(s) == shape_of(p) for s, p in zip(sources, slices, strict=True)
    )
    if len(axes) != 1 or not shapes_agree or any(reader < writes[-1] for reader in empty.users if reader not in slices):
        return
    (axis,) = axes
    if not isinstance(axis, int) or not _covers(slices, shape_of(empty)[axis]):
        return
    builder = Builder(program, writes[-1], label="", like=empty)
    joined = builder.call(aten.cat.default, sources, axis)
    joined.meta.pop("custom")
    empty.replace_all_uses_with(joined, delete_user_cb=lambda user: user not in slices)
    for dead in (*writes, *slices, empty):
        program.graph.erase_node(dead)


def _covers(slices: list[fx.Node], size: object) -> bool:
    """Whether the slices follow one another from 0 to the end."""
    end: object = 0
    for part in slices:
        start, stop = (*part.args[2:4], None, None)[:2]
        if start != end or len(part.args) > 4:
            return False
        end = stop
    return isinstance(end, int) and isinstance(size, int) and end >= size


def _in_place_to_new(node: fx.Node) -> None:
    """`add_(a, b)` to `add(a, b)`, which every later reader of `a` then reads."""
    written = node.args[0] if node.args else None
    functional = _functional(node.target)
    if functional is None or not isinstance(written, fx.Node) or _shares_memory(written, node):
        return
    node.target = functional
    written.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)


def _functional(target: object) -> torch._ops.OpOverload | None:
    """The op that makes a new value, for one that ends in an underscore."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target.overloadpacket.__name__
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return getattr(packet, target._overloadname, None)


_FRESH = (aten.topk.default, aten.sort.default, aten.max.dim, aten.min.dim)
"""Ops of several results, each in memory of its own."""


def _shares_memory(written: fx.Node, writer: fx.Node) -> bool:
    """Whether the value is, or may be, a view of one that is read elsewhere, or a view of it is read later."""
    root = written
    while is_call(root, *VIEWS, *PIECES) or (is_getitem(root) and not is_call(root.args[0], *_FRESH)):
        (root,) = root.all_input_nodes[:1]
        if len(root.users) > 1:
            return True
    if root.op == "placeholder":
        return True
    views = [user for user in written.users if is_call(user, *VIEWS, *PIECES) and user < writer]
    return any(reader > writer for view in views for reader in view.users)
