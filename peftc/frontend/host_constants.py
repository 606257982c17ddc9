"""Constants that a model writes down in its forward, kept though its weights are on the meta device.

`x[..., [-2]]` and `torch.tensor([1, 2], device=x.device)` make a tensor on the device of the weights. While a model is
traced that device holds no values, and the numbers would be lost. They are made on the host instead; a copy to the
device is a node of the graph, which follows the graph to whatever device it runs on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class HostConstants(TorchFunctionMode):
    """While it is on, numbers written in a forward become tensors on the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and _listed(args[1]):
            return func(args[0], _on_host(args[1]))
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


def _listed(index: Any) -> bool:
    """Whether an index names rows by a list of numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(_numbers(part) for part in parts)


def _numbers(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and all(type(number) is int for number in part)


def _on_host(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    alone = sum(isinstance(part, (list, torch.Tensor)) for part in parts) == 1
    return tuple(_rows(part, alone=alone) if _numbers(part) else part for part in parts)


def _rows(numbers: list[int], *, alone: bool) -> Any:
    """A slice where it is one row, which keeps the axis as the list does; the list itself as a tensor otherwise."""
    if alone and len(numbers) == 1:
        return slice(numbers[0], numbers[0] + 1 or None)
    return torch.tensor(numbers)
