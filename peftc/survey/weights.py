"""Random weights for a skeleton: noise for matrices, near 1 for the scale of a norm; tied names share a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peftc.frontend.trace import Skeleton


def random_state(skeleton: Skeleton, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, in float32."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    state = dict(skeleton.buffers)
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.dim() == 1 and name.endswith("weight")
            made[id(parameter)] = 1 + 0.1 * noise if scale else 0.15 * noise
        state[name] = made[id(parameter)]
    return state
