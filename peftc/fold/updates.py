"""Updates: how a decision changes the base's tensors. Each is computed when its tensor is written, from the tensor
itself and the deltas it needs, so a fold holds one weight at a time.

With rows as vectors and h' = h B + x A + c at a linear h = x Wᵀ + b:

    output side:  W' = Bᵀ W + Aᵀ,   b' = b B + c
    input side:   W' = W Bᵀ,        b' = b + W cᵀ        (the linear reads h' = h B + c)
    parameter:    W' = f(W)
    widening:     rows are added to the up projection, columns to the down projection (`peftc.fold.hidden`)

Where a row of the stored tensor changes by itself (W + Aᵀ with an A of two narrow factors, and W Bᵀ), so does a block
of rows, and neither the tensor nor A or B stands in memory whole: the factors are had at the narrowest value that x
passes through, W Bᵀ is rows taken back through the inserted subgraph (`peftc.fold.evaluate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from peftc.fold.decide import Decision
from peftc.fold.evaluate import Read, bottleneck, evaluate, evaluate_rows, pull_back
from peftc.fold.hidden import WidenUpdate
from peftc.fold.linears import Reach
from peftc.ir.program import Program
from peftc.ir.sites import Linear

RowUpdate = Callable[[int, torch.Tensor], None]
"""Changes a block of rows in place; the first argument is the number of the first of them."""


Prepare = Callable[[Read, torch.dtype], RowUpdate]
"""Reads what a row update needs, once, in the dtype that it computes in."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A change of a tensor of n rows and m columns as it is stored: [n, r] and [r, m], whose product is added."""


class Update(Protocol):
    """A change of some tensors, by state-dict name; `read` gives tensors as they are when the update's turn comes."""

    @property
    def touches(self) -> tuple[str, ...]: ...
    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]: ...
    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor: ...
    def by_rows(self, name: str) -> Prepare | None:
        """What makes the update of blocks of rows, where a row of the result depends on that row alone."""
        ...

    def factors(self, name: str, shape: tuple[int, ...], read: Read) -> Factors | None:
        """The change of a stored tensor of this shape, in float64, where it is a product of two narrow factors."""
        ...


def updates_for(program: Program, decisions: Iterable[Decision]) -> list[Update]:
    """The updates of all "merged" and "widened" decisions, in the order in which they hold.

    Along x -> W -> h: what replaces W comes first, then what follows h (in the order of the graph), then what
    precedes x (the nearest to W first).
    """
    reach = Reach(program)

    def turn(decision: Decision) -> tuple[int, int]:
        place = reach.order[decision.insertion.after]
        if decision.side == "parameter":
            return 0, place
        return (2, -place) if decision.side == "input" else (1, place)

    folding = sorted((d for d in decisions if d.folds), key=turn)
    first: dict[object, Decision] = {}
    for decision in folding:  # what calls of one module do to its weight in common is done to it once
        first.setdefault(_change(program, decision), decision)
    return [_update(reach, decision) for decision in first.values()]


def _change(program: Program, decision: Decision) -> object:
    """What makes two decisions one and the same change of a tensor."""
    insertion, tap = decision.insertion, decision.insertion.site.taps[decision.insertion.tap]
    name = program.parameter_name(tap.node) if decision.into is None else decision.into.weight_name
    if name is None:
        return id(decision)
    return insertion.delta, insertion.tap, insertion.parameters, decision.side, name, insertion.site.path


def _update(reach: Reach, decision: Decision) -> Update:
    if decision.widening is not None:
        return WidenUpdate(reach.program, decision.insertion, decision.widening)
    if decision.side == "parameter":
        return ParameterUpdate(reach.program, decision)
    assert decision.into is not None
    kind = OutputUpdate if decision.side == "output" else InputUpdate
    return kind(reach, decision, decision.into)


@dataclass(frozen=True, slots=True)
class _AtLinear:
    """What the two sides share: the coefficients B, A and c of the inserted subgraph."""

    reach: Reach
    decision: Decision
    linear: Linear

    @property
    def touches(self) -> tuple[str, ...]:
        decision, linear = self.decision, self.linear
        weight = not decision.unit or decision.reads_x
        bias = decision.offset or (not decision.unit and decision.side == "output")
        names = [linear.weight_name] if weight else []
        return (*names, linear.bias_name) if bias and linear.bias_name else tuple(names)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def _at(self, h: torch.Tensor | None, x: torch.Tensor | None, read: Read, dtype: torch.dtype) -> torch.Tensor:
        """h' for rows of h and of x; None stands for zero."""
        insertion = self.decision.insertion
        feeds: dict[fx.Node, torch.Tensor] = {}
        for node, rows in ((insertion.before, h), (self.reach.input_of(insertion), x)):
            if node is not None:
                feeds[node] = torch.zeros(1, _width(node), dtype=dtype) if rows is None else rows
        return evaluate_rows(self.reach.program, insertion.after, feeds, read, dtype)

    def _offset(self, read: Read, dtype: torch.dtype) -> torch.Tensor:
        """c, as one row [1, d]."""
        return self._at(None, None, read, dtype)

    def _of_h(self, rows: torch.Tensor, read: Read) -> torch.Tensor:
        """`rows` B."""
        return rows if self.decision.unit else self._at(rows, None, read, rows.dtype) - self._offset(read, rows.dtype)

    def _of_x(self, read: Read, dtype: torch.dtype) -> torch.Tensor:
        """A."""
        return self._at(None, torch.eye(_width(self._x), dtype=dtype), read, dtype) - self._offset(read, dtype)

    @property
    def _x(self) -> fx.Node:
        x = self.reach.input_of(self.decision.insertion)
        assert x is not None
        return x

    def _zeros(self, dtype: torch.dtype) -> dict[fx.Node, torch.Tensor]:
        """One row of zeros for each of h and x."""
        streams = (self.decision.insertion.before, self.reach.input_of(self.decision.insertion))
        return {node: torch.zeros(1, _width(node), dtype=dtype) for node in streams if node is not None}


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _canonical(linear: Linear, weight: torch.Tensor) -> torch.Tensor:
    """The weight as [d_out, d_in], a view; the same function turns it back."""
    return weight.t() if linear.transposed else weight


@dataclass(frozen=True, slots=True)
class OutputUpdate(_AtLinear):
    """h is the output of the linear, or a part of it: the rows that `Reach.rows` names."""

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        rows = self.reach.rows(self.decision.insertion, self.linear)
        result = tensor.clone()
        if name == self.linear.bias_name:
            result[rows] = self._of_h(tensor[rows][None], read)[0] + self._offset(read, tensor.dtype)[0]
            return result
        prepare = self.by_rows(name)
        if prepare is not None:
            prepare(read, tensor.dtype)(0, result)
            return result
        weight = _canonical(self.linear, result)
        part = self._of_h(weight[rows].t(), read).t()
        if self.decision.reads_x:
            columns = self._of_x(read, tensor.dtype).t()
            part = part.clone()
            part[:, : columns.shape[1]] += columns  # hidden units that a widening has added read no x of this delta
        weight[rows] = part
        return result

    def by_rows(self, name: str) -> Prepare | None:
        if name != self.linear.weight_name or not self.decision.unit or self._narrow() is None:
            return None
        return self._prepare

    def _prepare(self, read: Read, dtype: torch.dtype) -> RowUpdate:
        left, right = self._factors(read, dtype)
        mine, width = self.reach.rows(self.decision.insertion, self.linear), right.shape[1]
        start = int(mine[0]) if len(mine) else 0
        together = torch.equal(mine, torch.arange(start, start + len(mine)))

        def update(first: int, block: torch.Tensor) -> None:
            last = first + block.shape[0]
            if self.linear.transposed:  # stored rows are features of x
                block[: max(0, width - first), mine] += right[:, first:last].t() @ left.t()
                return
            if together:
                low, high = max(first, start), min(last, start + len(mine))
                if low < high:
                    block[low - first : high - first, :width].addmm_(left[low - start : high - start], right)
                return
            here = ((mine >= first) & (mine < last)).nonzero().flatten()
            block[mine[here] - first, :width] += left[here] @ right

        return update

    def factors(self, name: str, shape: tuple[int, ...], read: Read) -> Factors | None:
        if self.by_rows(name) is None:
            return None
        left, right = self._factors(read, torch.float64)
        d_out, d_in = reversed(shape) if self.linear.transposed else shape
        tall, wide = left.new_zeros(d_out, left.shape[1]), right.new_zeros(right.shape[0], d_in)
        tall[self.reach.rows(self.decision.insertion, self.linear)] = left
        wide[:, : right.shape[1]] = right
        return (wide.t(), tall.t()) if self.linear.transposed else (tall, wide)

    def _narrow(self) -> fx.Node | None:
        insertion = self.decision.insertion
        return bottleneck(self.reach.program, insertion.after, self._x, [insertion.before])

    def _factors(self, read: Read, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Aᵀ = left right, with left [d_out, r] and right [r, d_in], cut where x has r features."""
        narrow, insertion, program = self._narrow(), self.decision.insertion, self.reach.program
        assert narrow is not None
        zeros, eye = self._zeros(dtype), torch.eye(_width(narrow), dtype=dtype)
        right = pull_back(program, narrow, self._x, eye, zeros, read)

        def beyond(rows: torch.Tensor) -> torch.Tensor:
            return evaluate_rows(program, insertion.after, {**zeros, narrow: rows}, read, dtype)

        return (beyond(eye) - beyond(torch.zeros_like(eye[:1]))).t().contiguous(), right


@dataclass(frozen=True, slots=True)
class InputUpdate(_AtLinear):
    """h' is the input of the linear."""

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        width = self.linear.d_in  # columns that a widening has added do not read h'
        if name == self.linear.bias_name:
            weight = _canonical(self.linear, read(self.linear.weight_name).to(tensor.dtype))[:, :width]
            return tensor + weight @ self._offset(read, tensor.dtype)[0]
        result = tensor.clone()
        self._prepare(read, tensor.dtype)(0, _canonical(self.linear, result))
        return result

    def by_rows(self, name: str) -> Prepare | None:
        return self._prepare if name == self.linear.weight_name and not self.linear.transposed else None

    def _prepare(self, read: Read, dtype: torch.dtype) -> RowUpdate:
        insertion, width, zeros = self.decision.insertion, self.linear.d_in, self._zeros(dtype)

        def update(_: int, block: torch.Tensor) -> None:
            program, old = self.reach.program, block[:, :width]
            block[:, :width] = pull_back(program, insertion.after, insertion.before, old, zeros, read)

        return update

    def factors(self, name: str, shape: tuple[int, ...], read: Read) -> None:
        """W Bᵀ - W is as wide as W."""


@dataclass(frozen=True, slots=True)
class ParameterUpdate:
    """h is a parameter: evaluate the new one."""

    program: Program
    decision: Decision

    @property
    def touches(self) -> tuple[str, ...]:
        insertion = self.decision.insertion
        name = self.program.parameter_name(insertion.site.taps[insertion.tap].node)
        assert name is not None
        return (name,)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        insertion = self.decision.insertion
        transposed = insertion.site.taps[insertion.tap].layout == "transposed"
        h = tensor.transpose(-2, -1) if transposed else tensor
        value = evaluate(self.program, insertion.after, {insertion.before: h}, read, tensor.dtype)
        return value.transpose(-2, -1) if transposed else value

    def by_rows(self, name: str) -> None:
        """A parameter is evaluated whole."""

    def factors(self, name: str, shape: tuple[int, ...], read: Read) -> None:
        """A new parameter is no sum of the old one and a product."""
