"""set-mode: turn a graph traced in train mode into the training or the evaluation graph.

A train trace keeps every dropout with its probability; evaluation switches them off, including the one inside fused
attention and the running statistics of batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.ir.program import is_call

aten = torch.ops.aten

_FLAG: dict[object, int] = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.rrelu.default: 3,
    aten.batch_norm.default: 5,
}
"""The position of each op's `training` argument."""

_SDPA_DROPOUT = 4


@dataclass(frozen=True, slots=True)
class SetMode:
    """Set every mode-dependent op of a graph to `training`."""

    name: ClassVar[str] = "set-mode"
    training: bool

    def apply_to(self, graph: fx.Graph) -> None:
        if self.training:
            return
        for node in graph.nodes:
            index = _FLAG.get(node.target) if node.op == "call_function" else None
            if index is not None and len(node.args) > index:
                node.update_arg(index, False)
            elif is_call(node, aten.scaled_dot_product_attention.default):
                if len(node.args) > _SDPA_DROPOUT:
                    node.update_arg(_SDPA_DROPOUT, 0.0)
                if "dropout_p" in node.kwargs:
                    node.update_kwarg("dropout_p", 0.0)
