"""A decoder of any depth as a program, written op by op on fake tensors: exporting thousands of nodes takes minutes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.ir.program import Binding, Program

aten = torch.ops.aten

D, FF, HEADS = 64, 128, 4


@dataclass
class Writer:
    """Writes nodes with fake values, and parameters as placeholders."""

    mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    graph: fx.Graph = field(default_factory=fx.Graph)
    bindings: dict[fx.Node, Binding] = field(default_factory=dict)
    path: str = ""
    last: fx.Node | None = None

    def placeholder(self, kind: Any, name: str, *shape: int) -> fx.Node:
        context = self.graph.inserting_after(self.last) if self.last else self.graph.inserting_before(None)
        with context:
            node = self.graph.placeholder(name.replace(".", "_"))
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        self.bindings[node] = Binding(kind, name)
        self.last = node
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            values = fx.map_arg((args, kwargs), lambda operand: operand.meta["val"])
            node.meta["val"] = target(*values[0], **values[1])
        node.meta["nn_module_stack"] = {"module": (self.path, None)}
        return node

    def linear(self, x: fx.Node, name: str, d_out: int, d_in: int) -> fx.Node:
        weight = self.placeholder("parameter", f"{self.path}.{name}.weight", d_out, d_in)
        return self.call(aten.linear.default, x, weight)

    def norm(self, x: fx.Node, name: str) -> fx.Node:
        weight = self.placeholder("parameter", f"{self.path}.{name}.weight", D)
        mean = self.call(aten.mean.dim, self.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        scale = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, mean, 1e-6))
        normed = self.call(aten.to.dtype, self.call(aten.mul.Tensor, x, scale), torch.float32)
        return self.call(aten.mul.Tensor, weight, normed)

    def heads(self, x: fx.Node) -> fx.Node:
        return self.call(aten.transpose.int, self.call(aten.view.default, x, [2, 8, HEADS, D // HEADS]), 1, 2)

    def rotated(self, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
        half = D // HEADS // 2
        low, high = self.call(aten.slice.Tensor, x, 3, 0, half), self.call(aten.slice.Tensor, x, 3, half, 2**63 - 1)
        turned = self.call(aten.cat.default, [self.call(aten.neg.default, high), low], -1)
        return self.call(aten.add.Tensor, self.call(aten.mul.Tensor, x, cos), self.call(aten.mul.Tensor, turned, sin))


def decoder(layers: int) -> Program:
    """Llama's layer, `layers` times, on 2 rows of 8 tokens."""
    w = Writer()
    x = w.placeholder("input", "x", 2, 8, D)
    cos, sin = (w.placeholder("input", name, 1, 1, 8, D // HEADS) for name in ("cos", "sin"))
    for layer in range(layers):
        w.path = f"layers.{layer}"
        normed = w.norm(x, "input_norm")
        q, k, v = (w.heads(w.linear(normed, name, D, D)) for name in ("q", "k", "v"))
        attended = w.call(aten.scaled_dot_product_attention.default, w.rotated(q, cos, sin), w.rotated(k, cos, sin), v)
        merged = w.call(aten.reshape.default, w.call(aten.transpose.int, attended, 1, 2), [2, 8, D])
        x = w.call(aten.add.Tensor, x, w.linear(merged, "o", D, D))
        normed = w.norm(x, "post_norm")
        gate = w.call(aten.silu.default, w.linear(normed, "gate", FF, D))
        mid = w.call(aten.mul.Tensor, gate, w.linear(normed, "up", FF, D))
        x = w.call(aten.add.Tensor, x, w.call(aten.dropout.default, w.linear(mid, "down", D, FF), 0.1, True))
    w.graph.output([x])
    return Program(None, fx.GraphModule({}, w.graph), w.bindings, {})  # type: ignore[arg-type]
