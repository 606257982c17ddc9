"""The update of a widened delta: its hidden units join the FFN's. See `peftc.fold.widen` for the algebra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftc.fold.evaluate import Read, evaluate_rows, selection
from peftc.fold.widen import Widening
from peftc.ir.program import Insertion, Program
from peftc.ir.sites import Linear

FUSED = "gate_up"


@dataclass(frozen=True, slots=True)
class WidenUpdate:
    """Rows at the end of the up (and gate) projection, columns at the end of the down projection.

    A fused projection holds its streams one after the other, and each becomes longer at its own end.
    """

    program: Program
    insertion: Insertion
    widening: Widening

    @property
    def _linears(self) -> dict[str, Linear]:
        return self.insertion.site.linears

    @property
    def touches(self) -> tuple[str, ...]:
        names = [linear.weight_name for linear in self._linears.values()]
        biased = [linear for role, linear in self._linears.items() if role != "down" or self.widening.output_offset]
        return (*names, *(linear.bias_name for linear in biased if linear.bias_name))

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        role, linear = self._owner(name)
        grown = list(shape)
        if role == "down":
            if name == linear.weight_name:
                grown[0 if linear.transposed else 1] += self.widening.rank
            return tuple(grown)
        axis = 1 if linear.transposed and name == linear.weight_name else 0
        grown[axis] += self.widening.rank * len(self._streams(role))
        return tuple(grown)

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        role, linear = self._owner(name)
        if name == linear.bias_name:
            down = role == "down"
            return tensor + self._output(read, tensor.dtype)[1] if down else self._longer(role, tensor, 1, read)
        weight = tensor.t() if linear.transposed else tensor
        if role == "down":
            joined = torch.cat([weight, self._output(read, tensor.dtype)[0]], 1)
        else:
            joined = self._longer(role, weight, 0, read)
        return joined.t() if linear.transposed else joined

    def by_rows(self, name: str) -> None:
        """A widened tensor grows, and is made whole."""

    def factors(self, name: str, shape: tuple[int, ...], read: Read) -> None:
        """What is added stands beside the old tensor, not on it."""

    def _owner(self, name: str) -> tuple[str, Linear]:
        return next((r, li) for r, li in self._linears.items() if name in (li.weight_name, li.bias_name))

    def _streams(self, role: str) -> list[str]:
        """The streams that a projection holds, in the order of its rows."""
        if role != FUSED:
            return [role]
        source, taps = self._linears[role].node, self.insertion.site.taps
        first = {s: int(selection(self.program, source, taps[s].node, taps[s].layout)[0]) for s in ("gate", "up")}
        return sorted(first, key=lambda stream: first[stream])

    def _longer(self, role: str, tensor: torch.Tensor, part: int, read: Read) -> torch.Tensor:
        """Each stream's rows, followed by the delta's (`part` 0: of the weight, 1: of the bias)."""
        streams = self._streams(role)
        blocks = zip(streams, tensor.chunk(len(streams)), strict=True)
        return torch.cat([piece for s, rows in blocks for piece in (rows, self._input(s, read, tensor.dtype)[part])])

    def _input(self, stream: str, read: Read, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The delta's map from x to a hidden stream: weight [r, d_in] and bias [r]."""
        x, wanted = self.widening.x, self.widening.inputs[stream]
        width = int(x.meta["val"].shape[-1])
        zero, eye = torch.zeros(1, width, dtype=dtype), torch.eye(width, dtype=dtype)
        offset = evaluate_rows(self.program, wanted, {x: zero}, read, dtype)
        return (evaluate_rows(self.program, wanted, {x: eye}, read, dtype) - offset).t(), offset[0]

    def _output(self, read: Read, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The map from the hidden value to what is added to h: weight [d_out, r] and offset [d_out]."""
        insertion, rank = self.insertion, self.widening.rank
        h = torch.zeros(1, int(insertion.before.meta["val"].shape[-1]), dtype=dtype)

        def at(hidden: torch.Tensor) -> torch.Tensor:
            feeds: dict[fx.Node, torch.Tensor] = {insertion.before: h, self.widening.activated: hidden}
            return evaluate_rows(self.program, insertion.after, feeds, read, dtype)

        offset = at(torch.zeros(1, rank, dtype=dtype))
        return (at(torch.eye(rank, dtype=dtype)) - offset).t(), offset[0]
