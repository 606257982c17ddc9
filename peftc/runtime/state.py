"""The state of a model: its tensors by name, as the graph asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peftc.runtime.states import States


def state_of(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers by name, read through the module tree at each access, so that `.to()` holds."""
    return _State(model)


class _State(Mapping[str, torch.Tensor]):
    __slots__ = ("_held", "_mixed", "_model", "_states")

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._states: States | None = model.__dict__.get("_states")
        self._held = self._states.active if self._states is not None else None
        self._mixed = self._states.mixed if self._states is not None else None

    def __getitem__(self, name: str) -> torch.Tensor:
        states, held = self._states, self._held
        if states is not None and self._mixed is not None:
            found = self._mixed.tensor(states, name)
            if isinstance(found, torch.Tensor):
                return found
            name = found
        elif states is not None and held is not None and (states.bare or states.active is not held):
            name = states.place(held, name)  # activations are computed again after a switch
        path, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(path), leaf)

    def __iter__(self) -> Any:
        yield from (name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)
