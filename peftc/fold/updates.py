"""Updates: how a decision changes the base's tensors. Each is computed when its tensor is written, from the tensor
itself and the deltas it needs, so a fold holds one weight at a time.

With rows as vectors and h' = h B + x A + c at a linear h = x Wᵀ + b:

    output side:  W' = Bᵀ W + Aᵀ,   b' = b B + c
    input side:   W' = W Bᵀ,        b' = b + W cᵀ        (the linear reads h' = h B + c)
    parameter:    W' = f(W)
    widening:     rows are added to the up projection, columns to the down projection
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from peftc.fold.decide import Decision
from peftc.fold.evaluate import Read, evaluate, selection
from peftc.ir.program import Program
from peftc.ir.sites import Linear


class Update(Protocol):
    """A change of some tensors, by state-dict name."""

    @property
    def touches(self) -> tuple[str, ...]: ...
    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]: ...
    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor: ...


def update_for(program: Program, decision: Decision) -> Update:
    """The update that a "merged" or "widened" decision asks for."""
    if decision.widening is not None:
        return WidenUpdate(program, decision)
    if decision.side == "parameter":
        return ParameterUpdate(program, decision)
    return OutputUpdate(program, decision) if decision.side == "output" else InputUpdate(program, decision)


def _names(linear: Linear, *, bias: bool) -> tuple[str, ...]:
    return (linear.weight_name, linear.bias_name) if bias and linear.bias_name else (linear.weight_name,)


def _canonical(linear: Linear, weight: torch.Tensor) -> torch.Tensor:
    return weight.t() if linear.transposed else weight


@dataclass(frozen=True, slots=True)
class _AtLinear:
    """What the two sides share: the coefficients B, A and c of the inserted subgraph."""

    program: Program
    decision: Decision

    @property
    def _linear(self) -> Linear:
        assert self.decision.into is not None
        return self.decision.into

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return shape

    def _at(self, h: torch.Tensor, x: torch.Tensor | None, read: Read, dtype: torch.dtype) -> torch.Tensor:
        insertion = self.decision.insertion
        feeds: dict[fx.Node, torch.Tensor] = {}
        if insertion.x is not None and insertion.x is not insertion.before and x is not None:
            feeds[insertion.x] = x
        feeds[insertion.before] = h
        value = evaluate(self.program, insertion.after, feeds, read, dtype)
        return value.expand(max(h.shape[0], 1 if x is None else x.shape[0]), -1)

    def _widths(self) -> tuple[int, int]:
        """The widths of h and of x."""
        insertion = self.decision.insertion
        h = int(insertion.before.meta["val"].shape[-1])
        return h, h if insertion.x is None else int(insertion.x.meta["val"].shape[-1])

    def _offset(self, read: Read, dtype: torch.dtype) -> torch.Tensor:
        h, x = self._widths()
        return self._at(torch.zeros(1, h, dtype=dtype), torch.zeros(1, x, dtype=dtype), read, dtype)

    def _of_h(self, read: Read, dtype: torch.dtype) -> torch.Tensor | None:
        """B, or None where it is the identity."""
        if self.decision.unit:
            return None
        h, x = self._widths()
        eye = torch.eye(h, dtype=dtype)
        return self._at(eye, torch.zeros(h, x, dtype=dtype), read, dtype) - self._offset(read, dtype)

    def _of_x(self, read: Read, dtype: torch.dtype) -> torch.Tensor | None:
        """A, or None where the delta reads no x of its own."""
        insertion = self.decision.insertion
        if insertion.x is None or insertion.x is insertion.before:
            return None
        h, x = self._widths()
        eye = torch.eye(x, dtype=dtype)
        return self._at(torch.zeros(x, h, dtype=dtype), eye, read, dtype) - self._offset(read, dtype)


@dataclass(frozen=True, slots=True)
class OutputUpdate(_AtLinear):
    """h is the output of the linear, or a part of it: the rows that `selection` names."""

    @property
    def touches(self) -> tuple[str, ...]:
        return _names(self._linear, bias=self.decision.offset or not self.decision.unit)

    def _rows(self) -> torch.Tensor:
        tap = self.decision.insertion.site.taps[self.decision.insertion.tap]
        return selection(self.program, self._linear.node, tap.node, tap.layout)

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        rows, dtype = self._rows(), tensor.dtype
        of_h = self._of_h(read, dtype)
        result = tensor.clone()
        if name == self._linear.bias_name:
            part = tensor[rows] if of_h is None else tensor[rows] @ of_h
            result[rows] = part + self._offset(read, dtype)[0]
            return result
        weight = _canonical(self._linear, result)
        part = weight[rows] if of_h is None else of_h.t() @ weight[rows]
        of_x = self._of_x(read, dtype)
        weight[rows] = part if of_x is None else part + of_x.t()
        return result


@dataclass(frozen=True, slots=True)
class InputUpdate(_AtLinear):
    """h' is the input of the linear."""

    @property
    def touches(self) -> tuple[str, ...]:
        return _names(self._linear, bias=self.decision.offset)

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        dtype = tensor.dtype
        if name == self._linear.bias_name:
            weight = _canonical(self._linear, read(self._linear.weight_name).to(dtype))
            return tensor + weight @ self._offset(read, dtype)[0]
        of_h = self._of_h(read, dtype)
        if of_h is None:
            return tensor
        return (_canonical(self._linear, tensor) @ of_h.t()).t() if self._linear.transposed else tensor @ of_h.t()


@dataclass(frozen=True, slots=True)
class ParameterUpdate:
    """h is a parameter: evaluate the new one."""

    program: Program
    decision: Decision

    @property
    def _name(self) -> str:
        insertion = self.decision.insertion
        name = self.program.parameter_name(insertion.site.taps[insertion.tap].node)
        assert name is not None
        return name

    @property
    def touches(self) -> tuple[str, ...]:
        return (self._name,)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return shape

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:  # noqa: ARG002
        insertion = self.decision.insertion
        tap = insertion.site.taps[insertion.tap]
        canonical = tensor.t() if tap.layout == "transposed" else tensor
        value = evaluate(self.program, insertion.after, {insertion.before: canonical}, read, tensor.dtype)
        return value.t().contiguous() if tap.layout == "transposed" else value


@dataclass(frozen=True, slots=True)
class WidenUpdate:
    """The delta's hidden units join the FFN's."""

    program: Program
    decision: Decision

    @property
    def _linears(self) -> dict[str, Linear]:
        return self.decision.insertion.site.linears

    @property
    def touches(self) -> tuple[str, ...]:
        names = [name for role, linear in self._linears.items() for name in _names(linear, bias=role != "down")]
        widening = self.decision.widening
        assert widening is not None
        if widening.output_offset and self._linears["down"].bias_name:
            names.append(self._linears["down"].bias_name)
        return tuple(names)

    @property
    def rank(self) -> int:
        assert self.decision.widening is not None
        return self.decision.widening.rank

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        down = self._linears["down"]
        if name == down.bias_name:
            return shape
        grown = list(shape)
        if name == down.weight_name:
            grown[0 if down.transposed else 1] += self.rank
            return tuple(grown)
        role, linear = next((r, li) for r, li in self._linears.items() if name in (li.weight_name, li.bias_name))
        axis = 1 if linear.transposed and name == linear.weight_name else 0
        grown[axis] += self.rank * (2 if role == "gate_up" else 1)
        return tuple(grown)

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        down = self._linears["down"]
        if name == down.bias_name:
            return tensor + self._output(read, tensor.dtype)[1]
        if name == down.weight_name:
            joined = torch.cat([_canonical(down, tensor), self._output(read, tensor.dtype)[0]], 1)
            return joined.t().contiguous() if down.transposed else joined
        role, linear = next((r, li) for r, li in self._linears.items() if name in (li.weight_name, li.bias_name))
        if name == linear.bias_name:
            return self._joined(role, tensor, [self._input(s, read, tensor.dtype)[1] for s in self._streams(role)])
        canonical = _canonical(linear, tensor)
        joined = self._joined(role, canonical, [self._input(s, read, tensor.dtype)[0] for s in self._streams(role)])
        return joined.t().contiguous() if linear.transposed else joined

    @staticmethod
    def _streams(role: str) -> list[str]:
        return ["gate", "up"] if role == "gate_up" else [role]

    def _joined(self, role: str, tensor: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        """`parts` after the rows of each stream; a fused projection holds its streams one after the other."""
        if role != "gate_up":
            return torch.cat([tensor, parts[0]])
        site = self.decision.insertion.site
        source = self._linears[role].node
        pieces = []
        for stream, part in zip(self._streams(role), parts, strict=True):
            tap = site.taps[stream]
            pieces.append((selection(self.program, source, tap.node, tap.layout), part))
        pieces.sort(key=lambda piece: int(piece[0][0]))
        return torch.cat([block for rows, part in pieces for block in (tensor[rows], part)])

    def _input(self, stream: str, read: Read, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The delta's map from x to a hidden stream: weight [r, d_in] and bias [r]."""
        widening, x = self.decision.widening, self.decision.insertion.x
        assert widening is not None and x is not None
        width = int(x.meta["val"].shape[-1])
        zero = torch.zeros(1, width, dtype=dtype)
        offset = evaluate(self.program, widening.inputs[stream], {widening.x: zero, x: zero}, read, dtype)
        eye = torch.eye(width, dtype=dtype)
        matrix = evaluate(self.program, widening.inputs[stream], {widening.x: eye, x: eye}, read, dtype) - offset
        return matrix.t(), offset[0]

    def _output(self, read: Read, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The map from the hidden value to what is added to h: weight [d_out, r] and offset [d_out]."""
        insertion, widening = self.decision.insertion, self.decision.widening
        assert widening is not None
        width = int(insertion.before.meta["val"].shape[-1])

        def at(hidden: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(hidden.shape[0], width, dtype=dtype)
            feeds = {insertion.before: h, widening.activated: hidden}
            return evaluate(self.program, insertion.after, feeds, read, dtype)

        offset = at(torch.zeros(1, self.rank, dtype=dtype))
        return (at(torch.eye(self.rank, dtype=dtype)) - offset).t(), offset[0]
