"""How the ops are written as nodes; imported when a graph is written, by then torch is there anyway."""

from __future__ import annotations

import torch
from torch import fx

from peftc.extension import Builder

aten = torch.ops.aten


def squared_relu(builder: Builder, x: fx.Node) -> fx.Node:
    positive = builder.call(aten.relu.default, x)
    return builder.call(aten.mul.Tensor, positive, positive)
