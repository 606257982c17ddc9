"""Neutral defaults: values of the optional inputs with which every h' is h, proved on the graph.

An abstract interpretation of the inserted nodes. What is known of a value is that it has no entries (an axis of size
0), that all its entries are one number, or that it is another node's value. A product over an axis without entries is
zero, h plus zero is h, and rows without entries added to keys and values leave attention as it is; so a LoRA of rank 0,
an adapter of width 0 and a prefix of length 0 are proved alike. What is proved holds bit for bit, for finite h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.ir.program import DeltaParameter, Insertion, Program, is_call

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Number:
    """All entries are this number."""

    value: float


@dataclass(frozen=True, slots=True)
class Same:
    """The value of this node."""

    node: fx.Node


class Empty:
    """No entries."""


EMPTY, ZERO = Empty(), Number(0.0)
Known = Number | Same | Empty | None

_MOVES = (
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.flip.default, aten.roll.default,
    aten.mean.dim, aten.amax.default, aten.amin.default,
)  # fmt: skip
"""Ops whose entries are entries of the operand, or are that number where all entries are one."""

_POINTWISE = (
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.softplus.default, aten.neg.default, aten.abs.default, aten.sign.default, aten.exp.default, aten.sin.default,
    aten.cos.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.add.Tensor,
    aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.clamp.default, aten.floor.default,
    aten.round.decimals, aten.minimum.default, aten.maximum.default,
)  # fmt: skip

_PASSES = (aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.dropout.default)
"""Ops that change no value in an evaluation graph."""


def neutral_value(parameter: DeltaParameter) -> float:
    """The number that a parameter of fixed size is filled with by default: the one that it starts from, or 0."""
    if parameter.init.name == "ones":
        return 1.0
    return float(parameter.init.arguments[0]) if parameter.init.name == "constant" else 0.0


class Proof:
    """What is known of the nodes of a program, with parameters at the numbers of `defaults`, open sizes at 0."""

    def __init__(self, program: Program, defaults: Mapping[str, float], symbols: set[Any]) -> None:
        self._known: dict[fx.Node, Known] = {}
        self._symbols = symbols
        for name, node in program.placeholders("parameter").items():
            if name in defaults:
                self._known[node] = EMPTY if self._is_empty(node) else Number(defaults[name])
        self._entries = {entry.after: entry for entry in program.ledger}
        self._before = {entry.before for entry in program.ledger}
        inserted = program.inserted
        self._failed: list[Insertion] = []
        for node in program.graph.nodes:
            if node in inserted and node not in self._known:
                self._known[node] = self._transfer(node)
            if node in self._entries:
                self._settle(self._entries[node])

    @property
    def failed(self) -> list[Insertion]:
        """The entries of the ledger whose h' is not proved to be h."""
        return self._failed

    def _settle(self, entry: Insertion) -> None:
        if entry.lowering == "concat":
            proved = all(rows is not None and self._vanishes(_sizes(rows)[-3]) for rows in (entry.x, entry.dh))
        else:
            proved = entry.lowering != "prepend" and self.of(entry.after) == self.of(entry.before)
        if not proved:
            self._failed.append(entry)
        if entry.lowering != "concat":
            self._known[entry.after] = self.of(entry.before)
            self._known[entry.written] = self.of(entry.original)

    def of(self, value: Any) -> Known:
        """What is known of an argument."""
        if isinstance(value, fx.Node):
            return self._known.get(value, Same(value))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Number(float(value))
        return None

    def _vanishes(self, size: Any) -> bool:
        """Whether a size is 0 when every open size is."""
        if isinstance(size, int):
            return size == 0
        return size.node.expr.subs(dict.fromkeys(self._symbols, 0)) == 0

    def _is_empty(self, node: fx.Node) -> bool:
        return any(self._vanishes(size) for size in _sizes(node))

    def _transfer(self, node: fx.Node) -> Known:
        if isinstance(node.meta["val"], torch.Tensor) and self._is_empty(node):
            return EMPTY
        rule = next((rule for ops, rule in _RULES if is_call(node, *ops)), None)
        found = rule(self, node) if rule is not None else None
        if found is None and node in self._before:
            return Same(node)
        return found

    def _moved(self, node: fx.Node) -> Known:
        known = self.of(node.args[0])
        return known if isinstance(known, Number) else None

    def _passed(self, node: fx.Node) -> Known:
        return self.of(node.args[0])

    def _cast(self, node: fx.Node) -> Known:
        known = self.of(node.args[0])
        if isinstance(known, Same):  # up and back again is the identity, down is a rounding
            dtype, own = node.meta["val"].dtype, known.node.meta["val"].dtype
            return known if torch.promote_types(own, dtype) == dtype else None
        return known

    def _product(self, node: fx.Node) -> Known:
        operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
        zero = any(self.of(arg) == ZERO for arg in operands) or self._vanishes(_sizes(operands[0])[-1])
        if not zero:
            return None
        bias = node.args[2] if len(node.args) > 2 else None
        known = ZERO if bias is None else self.of(bias)
        return known if isinstance(known, Number) else None

    def _einsum(self, node: fx.Node) -> Known:
        spec, operands = str(node.args[0]), list(node.args[1])  # pyright: ignore[reportArgumentType]
        inputs, _, result = spec.replace(" ", "").partition("->")
        for letters, operand in zip(inputs.split(","), operands, strict=True):
            summed = (size for letter, size in zip(letters, _sizes(operand), strict=False) if letter not in result)  # pyright: ignore[reportArgumentType]
            if self.of(operand) == ZERO or ("." not in letters and any(self._vanishes(size) for size in summed)):
                return ZERO
        return None

    def _sum(self, node: fx.Node) -> Known:
        known = self.of(node.args[0])
        return ZERO if isinstance(known, Empty) or known == ZERO else None

    def _log_sum(self, node: fx.Node) -> Known:
        return Number(-math.inf) if isinstance(self.of(node.args[0]), Empty) else None

    def _joined(self, node: fx.Node) -> Known:
        parts = [part for part in node.args[0] if not isinstance(self.of(part), Empty)]  # pyright: ignore[reportOptionalIterable, reportGeneralTypeIssues, reportArgumentType]
        return self.of(parts[0]) if len(parts) == 1 else None

    def _normed(self, node: fx.Node) -> Known:
        """A row of equal entries has no variance: what is left is the bias."""
        if not isinstance(self.of(node.args[0]), Number):
            return None
        bias = node.args[3] if len(node.args) > 3 else None
        known = ZERO if bias is None else self.of(bias)
        return known if isinstance(known, Number) else None

    def _pointwise(self, node: fx.Node) -> Known:
        operands = [self.of(arg) for arg in node.args]
        numbers = [known.value for known in operands if isinstance(known, Number)]
        if len(numbers) == len(node.args):
            values = [torch.tensor(number, dtype=torch.float64) for number in numbers]
            target: Any = node.target
            if is_call(node, aten.pow.Tensor_Scalar, aten.clamp.default):
                return Number(float(target(values[0], *numbers[1:])))
            return Number(float(target(*values, **node.kwargs)))
        return self._arithmetic(node, *operands) if len(operands) == 2 else None

    def _arithmetic(self, node: fx.Node, left: Known, right: Known) -> Known:
        sums = is_call(node, aten.add.Tensor, aten.sub.Tensor)
        commutes = is_call(node, aten.add.Tensor, aten.mul.Tensor)
        unit = Number(0.0 if sums else 1.0)
        if right == unit:
            return self._whole(node, 0, left)
        if left == unit and commutes:
            return self._whole(node, 1, right)
        if not sums and (left == ZERO or (commutes and right == ZERO)):
            return ZERO
        if sums and isinstance(left, Number) and math.isinf(left.value):
            return left
        return None

    def _whole(self, node: fx.Node, index: int, known: Known) -> Known:
        """An operand that has the result's own shape, or any number."""
        operand = node.args[index]
        if isinstance(known, Number) or not isinstance(operand, fx.Node):
            return known
        alike = list(map(str, _sizes(operand))) == list(map(str, _sizes(node)))
        return known if alike and operand.meta["val"].dtype == node.meta["val"].dtype else None


def _sizes(node: fx.Node) -> list[Any]:
    value = node.meta["val"]
    return list(value.shape) if isinstance(value, torch.Tensor) else []


_RULES: tuple[tuple[tuple[Any, ...], Callable[[Proof, fx.Node], Known]], ...] = (
    (_MOVES, Proof._moved),
    (_PASSES, Proof._passed),
    ((aten.to.dtype,), Proof._cast),
    ((aten.linear.default, aten.matmul.default), Proof._product),
    ((aten.einsum.default,), Proof._einsum),
    ((aten.sum.dim_IntList,), Proof._sum),
    ((aten.logsumexp.default,), Proof._log_sum),
    ((aten.cat.default,), Proof._joined),
    ((aten.layer_norm.default,), Proof._normed),
    (_POINTWISE, Proof._pointwise),
)
"""What is known of a node, by its op."""
