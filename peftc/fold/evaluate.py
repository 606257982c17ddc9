"""Running a part of a graph on real tensors: the way a fold gets its numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.ir.program import Program, is_call

aten = torch.ops.aten

Read = Callable[[str], torch.Tensor]
"""Reads a parameter by its state-dict name."""


def evaluate(
    program: Program,
    wanted: fx.Node,
    feeds: Mapping[fx.Node, torch.Tensor],
    read: Read | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The value of `wanted` given `feeds`; parameters come from `read`, computed in `dtype` (default: as they are).

    Dropout is off. Symbolic sizes count as 1: feeds are single rows, or matrices of rows where no op asks for sizes.
    Raises `ValueError` when the value depends on something that is neither fed nor read.
    """
    with torch.no_grad():
        return _run(program, wanted, feeds, read, dtype)


def _run(
    program: Program,
    wanted: fx.Node,
    feeds: Mapping[fx.Node, torch.Tensor],
    read: Read | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    values: dict[fx.Node, Any] = dict(feeds)
    for node in _needed(wanted, set(feeds)):
        values[node] = _value(program, node, values, read, dtype)
    return values[wanted]


def evaluate_rows(
    program: Program,
    wanted: fx.Node,
    feeds: Mapping[fx.Node, torch.Tensor],
    read: Read,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same for matrices: a row of a feed [n, d] is one token, whatever the rank in the graph; gives [n, d_out]."""
    with torch.no_grad():
        return _run_rows(program, wanted, feeds, read, dtype)


def bottleneck(program: Program, wanted: fx.Node, source: fx.Node, others: Iterable[fx.Node]) -> fx.Node | None:
    """The narrowest value that all of `source` passes through on its way to `wanted`, where it is narrower than both.

    `others` are the other values that `wanted` may read. None where there is no such value.
    """
    fed = set(others) - {source}
    needed = [node for node in _needed(wanted, {source, *fed}) if node.op == "call_function"]
    widths = {node: _width(node) for node in needed if _width(node)}
    limit = min(_width(source), _width(wanted))
    for node in sorted(widths, key=widths.__getitem__):
        if widths[node] >= limit:
            return None
        if _reads(node, source, fed) and not _reads(wanted, source, {node, *fed}):
            return node
    return None


def _reads(node: fx.Node, source: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a value depends on `source` otherwise than through what is `known`."""
    return any(source in reader.all_input_nodes for reader in _needed(node, {source, *known}))


def _width(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.dim() else 0


def pull_back(
    program: Program,
    wanted: fx.Node,
    source: fx.Node,
    cotangents: torch.Tensor,
    feeds: Mapping[fx.Node, torch.Tensor],
    read: Read,
) -> torch.Tensor:
    """Rows taken back through a map: where `wanted` = `source` M + c for one token, the rows `cotangents` Mᵀ.

    `cotangents` is [n, d_wanted], the result [n, d_source] in its dtype; M is never made. `feeds` are single rows for
    the other streams.
    """
    width = int(source.meta["val"].shape[-1])
    rows = torch.zeros(cotangents.shape[0], width, dtype=cotangents.dtype, requires_grad=True)
    with torch.enable_grad():
        value = _run_rows(program, wanted, {**feeds, source: rows}, read, cotangents.dtype)
        if not value.requires_grad:
            return torch.zeros_like(rows, requires_grad=False)
        (result,) = torch.autograd.grad(value, rows, cotangents)
    return result


def _run_rows(
    program: Program, wanted: fx.Node, feeds: Mapping[fx.Node, torch.Tensor], read: Read, dtype: torch.dtype
) -> torch.Tensor:
    shaped = {node: rows.reshape(*[1] * (node.meta["val"].dim() - 2), *rows.shape) for node, rows in feeds.items()}
    count = max(rows.shape[0] for rows in feeds.values())
    value = _run(program, wanted, shaped, read, dtype)
    return value.reshape(-1, value.shape[-1]).expand(count, -1)


def _needed(wanted: fx.Node, known: set[fx.Node]) -> list[fx.Node]:
    order: list[fx.Node] = []
    seen = set(known)
    stack: list[tuple[fx.Node, bool]] = [(wanted, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not _is_size(node):
                stack.extend((operand, False) for operand in node.all_input_nodes)
    return order


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _value(
    program: Program, node: fx.Node, values: Mapping[fx.Node, Any], read: Read | None, dtype: torch.dtype | None
) -> Any:
    if _is_size(node):
        return as_one(node.meta["val"])
    if node.op == "placeholder":
        return _parameter(program, node, read, dtype)
    given: Any = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand])
    args, kwargs = given
    if is_call(node, aten.dropout.default):
        return args[0]
    if dtype is not None and is_call(node, aten.to.dtype, aten._to_copy.default) and args[0].is_floating_point():
        return args[0].to(dtype)
    target: Any = node.target
    return target(*_on_cpu(args), **_on_cpu(kwargs))


def _parameter(program: Program, node: fx.Node, read: Read | None, dtype: torch.dtype | None) -> torch.Tensor:
    binding = program.bindings[node]
    if binding.kind == "constant":
        return program.constants[binding.name]
    if read is None or binding.kind == "input":
        raise ValueError(f"{node} cannot be read here")
    value = read(binding.name)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def as_one(size: Any) -> int:
    """A size of the trace with every symbol of it 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _on_cpu(arguments: Any) -> Any:
    return pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), arguments)


def selection(program: Program, source: fx.Node, part: fx.Node, layout: str) -> torch.Tensor:
    """Which output rows of `source` (a linear) the value `part` is, in canonical order: a vector of indices.

    `part` must come from `source` through views and pieces alone, as the base graph has them; `layout` is that of the
    tap.
    """
    width = int(source.meta["val"].shape[-1])
    rows = torch.arange(width, dtype=torch.float64).reshape([1] * (source.meta["val"].dim() - 1) + [width])
    value = evaluate(program, part, _everywhere(program, source, rows))
    if layout == "bhsd":
        value = value.transpose(1, 2)
    return value.reshape(-1).round().long()


def _everywhere(program: Program, node: fx.Node, value: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
    """`value` for a node of the base graph and for every node that deltas have put in its place."""
    feeds = {node: value}
    while node in program.replaced:
        node = program.replaced[node]
        feeds[node] = value
    return feeds
