"""Whether deltas say of a token what they say of it in any piece of its text: what a cache needs of them.

With a cache a model is called with the tokens that are new, so a delta sees those alone. It means the same as on the
whole text when it computes each token by itself. A mean over the sequence, a place counted from the front, or a
sequence that the delta itself makes longer do not, and nodes that work on a symbolic axis in such a way give them
away. What deltas do inside an attention (a prefix) goes by the attention's own keys, past ones included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from peftc.ir.program import Insertion, Program, is_call, shape_of

aten = torch.ops.aten

_MAKERS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_HARMLESS = (
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
    aten.unflatten.int, aten.sym_size.int,
)  # fmt: skip


def across(program: Program) -> str | None:
    """What a delta of the program does that a cache does not admit, in words; None where each token stands alone."""
    longer = resizing(program)
    if longer is not None:
        return f"delta `{longer}` makes the sequence longer"
    deltas = [(f"delta `{i.delta}`", i.nodes) for i in program.ledger if i.lowering not in ("concat", "gated")]
    for what, nodes in (*deltas, *((f"the carried value `{c.name}`", c.own) for c in program.carried)):
        node = next(filter(_mixes, nodes), None)
        if node is not None:
            return f"{what} looks beyond a token: its `{_name(node)}` works along the sequence"
    return None


def resizing(program: Program) -> str | None:
    """The delta that makes the sequence longer, by its name; None where there is none."""
    return next((i.delta for i in program.ledger if i.lowering == "prepend" or _resizes(i)), None)


def _resizes(insertion: Insertion) -> bool:
    if insertion.lowering != "rewrite" or insertion.site.kind != "model":
        return False
    return shape_of(insertion.before) != shape_of(insertion.after)


def _mixes(node: fx.Node) -> bool:
    """Whether an op does on a symbolic axis what is no matter of single entries of it."""
    if node.op != "call_function" or is_call(node, *_HARMLESS):
        return False
    if is_call(node, *_MAKERS):
        return any(isinstance(argument, fx.Node) for argument in node.args)
    if is_call(node, *_PRODUCTS):
        return _is_symbolic(node.args[0], -1)
    if is_call(node, aten.einsum.default):
        return _contracts(node)
    name = _name(node)
    if name.startswith(("conv", "fft", "pad", "constant_pad", "roll", "flip", "unfold", "linalg")):
        return any(_is_symbolic(operand, axis) for operand in node.all_input_nodes for axis in _inner(operand))
    return any(_is_symbolic(operand, axis) for operand in _values(node) for axis in _named_axes(node))


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def _values(node: fx.Node) -> list[Any]:
    first = node.args[0] if node.args else None
    return list(first) if isinstance(first, (list, tuple)) else [first]


def _inner(node: fx.Node) -> range:
    value = node.meta.get("val")
    return range(1, value.dim()) if isinstance(value, torch.Tensor) else range(0)


def _named_axes(node: fx.Node) -> list[int]:
    """The axes that an op is told to work on, by the arguments that its schema calls `dim` or `dims`."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    found: list[int] = []
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    for argument in schema.arguments:
        if argument.name in ("dim", "dims"):
            value = given.get(argument.name, argument.default_value)
            every: Any = list(range(_rank(node))) if value is None else value
            found += list(every) if isinstance(every, (list, tuple)) else [every]
    if not found and _name(node) in ("sum", "mean", "prod", "amax", "amin", "max", "min", "norm"):
        return list(range(_rank(node)))
    return found


def _rank(node: fx.Node) -> int:
    value = _values(node)[0]
    return value.meta["val"].dim() if isinstance(value, fx.Node) else 0


def _is_symbolic(operand: Any, axis: int) -> bool:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not -value.dim() <= axis < value.dim():
        return False
    return not isinstance(value.shape[axis], int)


def _contracts(node: fx.Node) -> bool:
    """Whether an einsum sums over a symbolic axis."""
    equation, operands = node.args[0], node.args[1]
    sides = str(equation).replace(" ", "").split("->")
    if len(sides) != 2 or "." in sides[0]:
        return True
    for letters, operand in zip(sides[0].split(","), operands, strict=True):  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
        if any(letter not in sides[1] and _is_symbolic(operand, axis) for axis, letter in enumerate(letters)):
            return True
    return False
