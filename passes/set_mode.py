"""set-mode: turn a graph traced in train mode into the training or the evaluation graph.

A train trace keeps every dropout with its probability; evaluation switches them off, including the one inside fused
attention and the running statistics of batch norm. Stochastic depth, which models spell out, is one more:
x / keep * floor(keep + rand) is x.
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
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
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
            elif is_call(node, aten.rand.default, aten.rand_like.default):
                _keep_every_path(node)


def _keep_every_path(rand: fx.Node) -> None:
    """Take stochastic depth out: the product of x / keep with floor(keep + rand) becomes x."""
    total = _only_user(rand, aten.add.Tensor)
    drawn = _only_user(total, aten.floor.default, aten.floor_.default)
    product = _only_user(drawn, aten.mul.Tensor)
    if product is None or total is None:
        return
    scaled = next((node for node in product.all_input_nodes if is_call(node, aten.div.Tensor)), None)
    if scaled is not None and scaled.args[1] == total.args[1]:
        product.replace_all_uses_with(scaled.args[0])  # pyright: ignore[reportArgumentType]


def draws(graph: fx.Graph) -> list[fx.Node]:
    """What an evaluation graph still draws at random and its outputs depend on."""
    needed: set[fx.Node] = set()
    queue = [graph.output_node()]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue.extend(node.all_input_nodes)
    return [n for n in graph.nodes if _random(n) and (n in needed or (_writes(n) and n.all_input_nodes[0] in needed))]


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    known = node.target in _FLAG or is_call(node, aten.scaled_dot_product_attention.default)
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags and not known


def _writes(node: fx.Node) -> bool:
    """Whether it changes its first operand, which others read."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and bool(node.all_input_nodes)


def _only_user(node: fx.Node | None, *ops: object) -> fx.Node | None:
    users = [] if node is None else list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], *ops) else None
