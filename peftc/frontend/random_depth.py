"""Layers that a model skips at random in training, and spans it masks at random, are not in a graph.

LayerDrop (Fan et al. 2020) draws a number and branches on it in Python, and SpecAugment (Park et al. 2019) draws its
spans with numpy: a trace would keep one draw for ever. They are off while a model is traced, so its graph runs every
layer on the whole input, in training too. The model's config is as it was afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_OFF: dict[str, Any] = {
    "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "layer_drop": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip


@contextlib.contextmanager
def without_random_depth(model: torch.nn.Module) -> Iterator[None]:
    """Both off, in modules and in their configs, for as long as the context lasts."""
    changed: list[tuple[Any, str, Any]] = []
    for holder in _holders(model):
        for name, off in _OFF.items():
            value = holder.__dict__.get(name, off)
            if value and isinstance(value, (bool, float)):
                changed.append((holder, name, value))
                setattr(holder, name, off)
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def _holders(model: torch.nn.Module) -> list[Any]:
    """Every module, and every config that one of them holds, once."""
    modules = list(model.modules())
    configs = {id(config): config for m in modules if (config := m.__dict__.get("config")) is not None}
    return [*modules, *configs.values()]
