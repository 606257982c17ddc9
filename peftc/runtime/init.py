"""How delta parameters start: each from its own random stream, seeded by the run's seed and the parameter's name,
so that values depend neither on the order of parameters nor on the rest of the rule.
"""

from __future__ import annotations

import hashlib
import math

import torch

from peftc.ir.program import DeltaParameter


def initialize(parameter: DeltaParameter, seed: int) -> torch.Tensor:
    """A new tensor of the parameter's shape and dtype on the CPU, filled as its `init` says.

    fan_in is the last axis of the shape, fan_out the one before it (weights are [out, in]).
    """
    tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
    generator = torch.Generator().manual_seed(_stream(seed, parameter.name))
    name, arguments = parameter.init.name, parameter.init.arguments
    fan_in = parameter.shape[-1] if parameter.shape else 1
    fan_out = parameter.shape[-2] if len(parameter.shape) > 1 else fan_in
    with torch.no_grad():
        match name:
            case "zeros":
                return tensor.zero_()
            case "ones":
                return tensor.fill_(1.0)
            case "constant":
                return tensor.fill_(arguments[0])
            case "normal":
                return tensor.normal_(0.0, arguments[0], generator=generator)
            case "uniform":
                return tensor.uniform_(-arguments[0], arguments[0], generator=generator)
            case "kaiming_uniform":
                bound = 1 / math.sqrt(fan_in)
                return tensor.uniform_(-bound, bound, generator=generator)
            case "kaiming_normal":
                return tensor.normal_(0.0, math.sqrt(2 / fan_in), generator=generator)
            case "xavier_uniform":
                bound = math.sqrt(6 / (fan_in + fan_out))
                return tensor.uniform_(-bound, bound, generator=generator)
            case "eye":
                return tensor.zero_().fill_diagonal_(1.0)
    raise ValueError(f"unknown init {name}")


def _stream(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
