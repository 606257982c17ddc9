"""Folded tensors: the base's tensor, the updates that touch it in order, the stored dtype again.

A tensor is had whole, or, where every update of it goes by rows, in blocks of rows, so that a weight of any size is
folded in the memory of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peftc.diagnostics import fail
from peftc.fold.evaluate import Read
from peftc.fold.updates import Factors, Update


class FoldedState:
    """Reads tensors of the folded model by state-dict name.

    `read` gives the unfolded tensors (base and deltas); `updates` come in the order in which they hold (see
    `peftc.fold.updates.updates_for`). They are computed in `precision` (float32, or float64 on request; float64 always
    for a float64 tensor), and rounded once to the dtype the tensor is stored in.
    """

    def __init__(self, read: Read, updates: Sequence[Update], precision: torch.dtype = torch.float32) -> None:
        self._read = read
        self._precision = precision
        self._updates: dict[str, list[tuple[int, Update]]] = {}
        for index, update in enumerate(updates):
            for name in update.touches:
                self._updates.setdefault(name, []).append((index, update))

    @property
    def touched(self) -> tuple[str, ...]:
        return tuple(self._updates)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor after its updates."""
        for _, update in self._updates.get(name, ()):
            shape = update.shape(name, shape)
        return shape

    def __call__(self, name: str) -> torch.Tensor:
        """The folded tensor in the dtype of the unfolded one. Raises `PeftcError` E042 when it is not finite."""
        if name not in self._updates:
            return self._read(name)
        value, dtype = self._before(name, None)
        return finite(name, value.to(dtype).contiguous())

    def exact(self, name: str) -> torch.Tensor:
        """The folded tensor, not rounded yet."""
        return self._before(name, None)[0]

    def unfolded(self, name: str) -> torch.Tensor:
        """The tensor as it is before any update."""
        return self._read(name)

    def by_rows(self, name: str) -> bool:
        """Whether `row_update` may be used."""
        return all(update.by_rows(name) is not None for _, update in self._updates.get(name, ()))

    def row_update(self, name: str, stored: torch.dtype) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """A function from blocks of stored rows to the same rows folded, not rounded yet.

        Its first argument is the number of the first row; what the updates need is computed here, once.
        """
        dtype = self._precision_for(stored)
        prepared = [(update.by_rows(name), self._reader(index)) for index, update in self._updates.get(name, ())]
        steps = [prepare(read, dtype) for prepare, read in prepared if prepare is not None]

        def folded(first: int, rows: torch.Tensor) -> torch.Tensor:
            value = rows.to(dtype, copy=True)
            for step in steps:
                step(first, value)
            return value

        return folded

    def factors(self, name: str, shape: tuple[int, ...]) -> Factors | None:
        """The change of a tensor as a product of two narrow factors in float64, where every update of it is one."""
        found = [update.factors(name, shape, self._reader(index)) for index, update in self._updates.get(name, ())]
        parts = [part for part in found if part is not None]
        if not parts or len(parts) < len(found):
            return None
        return torch.cat([left for left, _ in parts], 1), torch.cat([right for _, right in parts], 0)

    def _before(self, name: str, limit: int | None) -> tuple[torch.Tensor, torch.dtype]:
        """The tensor after the updates with a lower number than `limit`, not rounded yet, and its stored dtype."""
        tensor = self._read(name)
        value = tensor
        if name in self._updates:
            value = tensor.to(self._precision_for(tensor.dtype))
        for index, update in self._updates.get(name, ()):
            if limit is None or index < limit:
                value = update.apply(name, value, self._reader(index))
        return value, tensor.dtype

    def _reader(self, limit: int) -> Read:
        return lambda other: self._before(other, limit)[0]

    def _precision_for(self, stored: torch.dtype) -> torch.dtype:
        return torch.float64 if stored == torch.float64 else self._precision


def finite(name: str, folded: torch.Tensor) -> torch.Tensor:
    """`folded`. Raises `PeftcError` E042 when it holds NaN or infinity."""
    if not torch.isfinite(folded).all():
        fail("E042", f"the merged {name} holds NaN or infinity", help="check the delta; nothing was written")
    return folded
