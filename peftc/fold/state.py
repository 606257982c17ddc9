"""Folded tensors, one at a time: the base's tensor, the updates that touch it in order, the stored dtype again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftc.diagnostics import fail
from peftc.fold.evaluate import Read
from peftc.fold.updates import Update


class FoldedState:
    """Reads tensors of the folded model by state-dict name.

    `read` gives the unfolded tensors (base and deltas). Updates are computed in float32, in float64 for a float64
    tensor, and rounded once to the dtype the tensor is stored in.
    """

    def __init__(self, read: Read, updates: Sequence[Update]) -> None:
        self._read = read
        self._updates: dict[str, list[Update]] = {}
        for update in updates:
            for name in update.touches:
                self._updates.setdefault(name, []).append(update)

    @property
    def touched(self) -> tuple[str, ...]:
        return tuple(self._updates)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor after its updates."""
        for update in self._updates.get(name, ()):
            shape = update.shape(name, shape)
        return shape

    def __call__(self, name: str) -> torch.Tensor:
        """The folded tensor. Raises `PeftcError` E042 when it holds NaN or infinity."""
        tensor = self._read(name)
        updates = self._updates.get(name)
        if not updates:
            return tensor
        working = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        value = tensor.to(working)
        for update in updates:
            value = update.apply(name, value, self._read)
        folded = value.to(tensor.dtype).contiguous()
        if not torch.isfinite(folded).all():
            fail("E042", f"the merged {name} holds NaN or infinity", help="check the delta; nothing was written")
        return folded
