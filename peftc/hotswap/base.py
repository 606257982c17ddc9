"""The base's own tensors, whatever deltas train: what a delta directory holds of the base is left aside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftc.runtime.unfolded import Unfolded
from peftc.store.stored import Stored

if TYPE_CHECKING:
    import torch

    from peftc.merging.adapted import Adapted


class BaseTensors(Unfolded):
    """Reads tensors of the base of `adapted`; a head that is not stored is the one that these deltas started from."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__(adapted.delta, adapted.base, adapted.skeleton, ())

    def __call__(self, name: str) -> torch.Tensor:
        return Stored.__call__(self, name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return Stored.rows(self, name, first, last)
