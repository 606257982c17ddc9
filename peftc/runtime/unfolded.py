"""The tensors of an adapted model by state-dict name, read from disk one at a time: deltas and trained base tensors
from the delta directory, the rest from the base.

    read = Unfolded(delta, base, skeleton, surgery.trained)
    read("encoder.layer.0.attention.peftc.lora.q.A")

What is on neither disk (a head that is new and was not trained, a tensor that transformers computes while it loads)
is taken from the base model as transformers loads it, whole, the first time that one is asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING

from peftc.runtime.delta_dir import DeltaDir
from peftc.store.model_dir import ModelDir
from peftc.store.stored import Stored

if TYPE_CHECKING:
    import torch

    from peftc.frontend.trace import Skeleton

KEPT = 1 << 26
"""Bytes of delta tensors that are kept after they were read: blocks of one weight ask for the same ones again."""


class Unfolded(Stored):
    """Reads tensors; `read` is the names of the delta tensors that were asked for."""

    def __init__(self, delta: DeltaDir, base: ModelDir, skeleton: Skeleton, trained: Collection[str]) -> None:
        super().__init__(base, skeleton)
        self._delta = delta
        self._trained = frozenset(trained)
        self._kept: dict[str, torch.Tensor] = {}
        self.read: set[str] = set()

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor: a delta as it was saved, one of the base as it is stored.

        Raises:
            PeftcError: E031, a file cannot be read.
            KeyError: the model has no such tensor.
        """
        return self._of_delta(name) if name in self._delta.header.tensors else super().__call__(name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        if name in self._delta.header.tensors:
            return self(name)[first:last]
        return super().rows(name, first, last)

    def otherwise(self, name: str) -> torch.Tensor:
        buffers = self._skeleton.buffers
        return buffers[name] if name in buffers else self._loaded[name]

    def _of_delta(self, name: str) -> torch.Tensor:
        self.read.add(name)
        if name not in self._kept:
            tensor = self._delta.read(name)
            if name in self._trained:
                tensor = tensor.to(self._skeleton.model.get_parameter(name).dtype)
            size = sum(t.nbytes for t in self._kept.values()) + tensor.nbytes
            while self._kept and size > KEPT:
                size -= self._kept.pop(next(iter(self._kept))).nbytes
            self._kept[name] = tensor
        return self._kept[name]

    @cached_property
    def _loaded(self) -> dict[str, torch.Tensor]:
        from peftc.runtime.api import load_base

        reference = self._delta.manifest["base"]
        model, _ = load_base(self._base, reference["head"], reference["num_labels"], reference["seed"])
        return dict(model.state_dict())
