"""The state of a model: its tensors by name, as the graph asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def state_of(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers by name, read through the module tree at each access, so that `.to()` holds."""
    return _State(model)


class _State(Mapping[str, torch.Tensor]):
    __slots__ = ("_model",)

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __getitem__(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(path), leaf)

    def __iter__(self) -> Any:
        yield from (name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)
