"""Random weights for a skeleton: noise for matrices, near 1 for the scale of a norm; tied names share a tensor.

What no node of the graph reads, such as a tower for images in a call with text, is zeros that take no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program


def read(program: Program) -> set[str]:
    """The parameters that the graph reads, their tied names too."""
    names = {name for name, node in program.placeholders("parameter").items() if node.users}
    return names | {name for name, first in program.tied.items() if first in names}


def random_state(skeleton: Skeleton, program: Program, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, in float32."""
    wanted = read(program)
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    state = dict(skeleton.buffers)
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        if name not in wanted:
            state[name] = torch.zeros(()).expand(parameter.shape)
            continue
        if id(parameter) not in made:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.dim() == 1 and name.endswith("weight")
            made[id(parameter)] = 1 + 0.1 * noise if scale else 0.15 * noise * _narrowed(parameter)
        state[name] = made[id(parameter)]
    return state


def _narrowed(parameter: torch.Tensor) -> float:
    """A factor for wide matrices: products of unit rows with them stay of the size that narrow ones give.

    Scores in the hundreds would round the softmax of an attention to one key, and no gradient would pass.
    """
    return min(1.0, (128 / parameter.shape[-1]) ** 0.5) if parameter.dim() == 2 else 1.0
