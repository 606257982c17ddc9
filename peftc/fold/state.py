"""Folded tensors, one at a time: the base's tensor, the updates that touch it in order, the stored dtype again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftc.diagnostics import fail
from peftc.fold.evaluate import Read
from peftc.fold.updates import Update


class FoldedState:
    """Reads tensors of the folded model by state-dict name.

    `read` gives the unfolded tensors (base and deltas); `updates` come in the order in which they hold (see
    `peftc.fold.updates.updates_for`). They are computed in float32, in float64 for a float64 tensor, and rounded once
    to the dtype the tensor is stored in.
    """

    def __init__(self, read: Read, updates: Sequence[Update]) -> None:
        self._read = read
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
        """The folded tensor. Raises `PeftcError` E042 when it holds NaN or infinity."""
        if name not in self._updates:
            return self._read(name)
        value, dtype = self._before(name, None)
        folded = value.to(dtype).contiguous()
        if not torch.isfinite(folded).all():
            fail("E042", f"the merged {name} holds NaN or infinity", help="check the delta; nothing was written")
        return folded

    def _before(self, name: str, limit: int | None) -> tuple[torch.Tensor, torch.dtype]:
        """The tensor after the updates with a lower number than `limit`, not rounded yet, and its stored dtype."""
        tensor = self._read(name)
        value = tensor
        if name in self._updates:
            value = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        for index, update in self._updates.get(name, ()):
            if limit is None or index < limit:
                value = update.apply(name, value, lambda other, index=index: self._before(other, index)[0])
        return value, tensor.dtype
