"""Walking the dataflow: what an op is to a walker, and the few directed searches that the finders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from peftc.ir.program import is_call, is_getitem

aten = torch.ops.aten

VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.flatten.using_ints, aten.unflatten.int, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten._to_copy.default, aten.type_as.default, aten.expand.default, aten.detach.default, aten.t.default,
)  # fmt: skip
"""Ops that pass a value on in another shape or dtype."""

PIECES = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.select.int)
"""Ops that pass on a part of a value."""

DROPOUT = (aten.dropout.default,)

NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default)

CONVS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip

NONLINEAR = (
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.softplus.default, aten.leaky_relu.default, aten.elu.default, aten.hardswish.default, aten.mish.default,
    aten.relu6.default, aten.erf.default, aten.selu.default, aten.hardtanh.default, aten.prelu.default,
    aten.relu_.default, aten.silu_.default, aten.gelu_.default, aten.hardsigmoid.default, aten.celu.default,
    aten.log_sigmoid.default,
)  # fmt: skip
"""Pointwise activations."""

POINTWISE = (
    aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.div.Tensor,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.minimum.default, aten.square.default, aten.exp.default, aten.sqrt.default, aten.abs.default,
)  # fmt: skip
"""Arithmetic an activation may be spelled with."""


def inputs_of(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def first_input(node: fx.Node) -> fx.Node:
    """The operand that carries the data of a view-like op."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def skip_back(node: fx.Node, *ops: object) -> fx.Node:
    """Walk to the producer while the node is one of `ops` (default: views and dropout)."""
    ops = ops or (*VIEWS, *DROPOUT)
    while is_call(node, *ops):
        node = first_input(node)
    return node


def backward(start: Iterable[fx.Node], stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Every node that feeds `start` (itself included), not looking past nodes where `stop` holds."""
    seen: dict[fx.Node, None] = {}
    queue = list(start)
    while queue:
        node = queue.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen[node] = None
        if not stop(node):
            queue.extend(inputs_of(node))
    return list(seen)


def reaches(source: fx.Node, within: set[fx.Node]) -> set[fx.Node]:
    """The nodes of `within` that `source` feeds through nodes of `within` (itself included)."""
    seen: set[fx.Node] = set()
    queue = [source]
    while queue:
        node = queue.pop()
        if node in seen or node not in within:
            continue
        seen.add(node)
        queue.extend(node.users)
    return seen


def is_size(node: fx.Node) -> bool:
    """A size that a view is made with; it says nothing of where the value comes from."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def is_piece(node: fx.Node) -> bool:
    """A part of a fused projection: a slice, a chunk, an index."""
    return is_call(node, aten.slice.Tensor, aten.select.int) or is_getitem(node)


def common_path(paths: Iterable[str]) -> str:
    """The longest dotted path that every path starts with."""
    split = [path.split(".") if path else [] for path in paths]
    if not split:
        return ""
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) != 1:
            break
        common.append(parts[0])
    return ".".join(common)
