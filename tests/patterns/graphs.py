"""Graphs written op by op on fake tensors: small ones for single claims, and a decoder of any depth.

Exporting a model of thousands of nodes takes minutes; writing it takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.ir.program import Binding, Program

aten = torch.ops.aten


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

    def parameter(self, name: str, *shape: int) -> fx.Node:
        return self.placeholder("parameter", f"{self.path}.{name}" if self.path else name, *shape)

    def linear(self, x: fx.Node, name: str, d_out: int, d_in: int, *, bias: bool = False) -> fx.Node:
        weight = self.parameter(f"{name}.weight", d_out, d_in)
        return self.call(aten.linear.default, x, weight, *([self.parameter(f"{name}.bias", d_out)] if bias else []))

    def program(self, *outputs: fx.Node) -> Program:
        self.graph.output(list(outputs))
        self.graph.lint()
        return Program(None, fx.GraphModule({}, self.graph), self.bindings, {})  # type: ignore[arg-type]


D, FF, HEADS = 64, 128, 4


def norm(w: Writer, x: fx.Node, name: str) -> fx.Node:
    weight = w.parameter(f"{name}.weight", D)
    mean = w.call(aten.mean.dim, w.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    scale = w.call(aten.rsqrt.default, w.call(aten.add.Tensor, mean, 1e-6))
    normed = w.call(aten.to.dtype, w.call(aten.mul.Tensor, x, scale), torch.float32)
    return w.call(aten.mul.Tensor, weight, normed)


def heads(w: Writer, x: fx.Node) -> fx.Node:
    return w.call(aten.transpose.int, w.call(aten.view.default, x, [2, 8, HEADS, D // HEADS]), 1, 2)


def rotated(w: Writer, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    half = D // HEADS // 2
    low, high = w.call(aten.slice.Tensor, x, 3, 0, half), w.call(aten.slice.Tensor, x, 3, half, 2**63 - 1)
    turned = w.call(aten.cat.default, [w.call(aten.neg.default, high), low], -1)
    return w.call(aten.add.Tensor, w.call(aten.mul.Tensor, x, cos), w.call(aten.mul.Tensor, turned, sin))


def decoder(layers: int) -> Program:
    """Llama's layer, `layers` times, on 2 rows of 8 tokens."""
    w = Writer()
    x = w.placeholder("input", "x", 2, 8, D)
    cos, sin = (w.placeholder("input", name, 1, 1, 8, D // HEADS) for name in ("cos", "sin"))
    for layer in range(layers):
        w.path = f"layers.{layer}"
        normed = norm(w, x, "input_norm")
        q, k, v = (heads(w, w.linear(normed, name, D, D)) for name in ("q", "k", "v"))
        attended = w.call(
            aten.scaled_dot_product_attention.default, rotated(w, q, cos, sin), rotated(w, k, cos, sin), v
        )
        merged = w.call(aten.reshape.default, w.call(aten.transpose.int, attended, 1, 2), [2, 8, D])
        x = w.call(aten.add.Tensor, x, w.linear(merged, "o", D, D))
        normed = norm(w, x, "post_norm")
        gate = w.call(aten.silu.default, w.linear(normed, "gate", FF, D))
        mid = w.call(aten.mul.Tensor, gate, w.linear(normed, "up", FF, D))
        x = w.call(aten.add.Tensor, x, w.call(aten.dropout.default, w.linear(mid, "down", D, FF), 0.1, True))
    return w.program(x)
