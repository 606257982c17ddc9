"""FSDP2 through accelerate without a GPU, to try it out and to test it.

accelerate 1.15 shards where it finds GPUs or their likes; without, its processes know nothing of each other. Here they
are told to be such a group, over gloo; the device stays the CPU.
"""

from __future__ import annotations

import os

import torch
from accelerate import DistributedType, PartialState


def prepare() -> bool:
    """Whether this process runs on the CPU alone; call it before anything of accelerate is made."""
    if torch.cuda.is_available():
        return False
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # pyright: ignore[reportAttributeAccessIssue]
    return True
