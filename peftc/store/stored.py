"""The tensors of a checkpoint by the state-dict names of its model, one at a time or some rows of one.

    read = Stored(ModelDir.open("merged"), skeleton)
    read("lm_head.weight")              # follows tied and renamed names
    read.rows("lm_head.weight", 0, 100)

Buffers that the model computes from its config come from the skeleton.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from peftc.diagnostics import fail
from peftc.store.keys import KeyMap, key_map
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import read_rows

if TYPE_CHECKING:
    import torch

    from peftc.frontend.trace import Skeleton


class Stored:
    """Reads from the checkpoint at `base`, whose model is `skeleton`."""

    def __init__(self, base: ModelDir, skeleton: Skeleton) -> None:
        self._base, self._skeleton = base, skeleton

    @cached_property
    def names(self) -> KeyMap:
        return key_map(self._skeleton.model, self._base.shapes())

    def key(self, name: str) -> str | None:
        """What the tensor is stored as, or None where it is not stored as it is."""
        return self.names.state_to_checkpoint.get(self.names.tied.get(name, name))

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor as it is stored. Raises `PeftcError` E031, E040."""
        key = self.key(name)
        return self.otherwise(name) if key is None else self._base.read(key)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """The rows [first, last) of the tensor. Raises as a call does."""
        key = self.key(name)
        return self(name)[first:last] if key is None else read_rows(self._base.tensors[key][0], key, first, last)

    def otherwise(self, name: str) -> torch.Tensor:
        """A tensor that is not stored as it is."""
        if name not in self._skeleton.buffers:
            fail("E040", f"{self._base.path} does not hold {name} as it is")
        return self._skeleton.buffers[name]
