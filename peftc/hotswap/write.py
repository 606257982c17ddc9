"""The joint graph as `model.onnx`: each optional input a graph input and an initializer with its default.

Weights are streamed as those of any export; defaults of open sizes hold nothing and stand in the graph's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from peftc.backends import onnx
from peftc.backends.onnx_graph import onnx_graph
from peftc.backends.onnx_weights import FoldedWeights, WeightsFile
from peftc.fold.state import FoldedState
from peftc.frontend.trace import InputSpec
from peftc.hotswap.base import BaseTensors
from peftc.hotswap.joint import Joint, OptionalInput


def write_model(
    directory: Path,
    joint: Joint,
    specs: Mapping[str, InputSpec],
    base: BaseTensors,
    *,
    metadata: Mapping[str, str],
    opset: int = onnx.DEFAULT_OPSET,
    progress: Callable[[int, int], None] | None = None,
) -> onnx.OnnxFiles:
    """Write the joint program with the base's tensors. Raises `PeftcError` E014, E031, E043."""
    program = joint.program
    onnx.check_kernels(program, opset)
    outputs, states = onnx.output_names(program), onnx.state_shapes(program)
    model = onnx_graph(program, specs, outputs, opset)
    for value, name in zip(model.graph.inputs, program.inputs, strict=True):
        value.name = name
        if name in joint.inputs:
            _make_optional(model, value, joint.inputs[name], base)
    model.metadata_props.update(metadata)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in states.values())
    weights = FoldedWeights(FoldedState(base, ()), base, {})
    with WeightsFile(directory, onnx.WEIGHTS, weights, progress, total) as file:
        file.fill(model, states)
    path = onnx.save_graph(model, directory / onnx.MODEL)
    return onnx.OnnxFiles(path, tuple(specs), outputs, opset, len(list(model.graph)))


def _make_optional(model: Any, value: Any, spec: OptionalInput, base: BaseTensors) -> None:
    import onnx_ir
    from onnx_ir import tensor_adapters

    if spec.neutral is None:
        default = base(spec.name).to(spec.dtype)
    else:
        default = torch.full(spec.default_shape, spec.neutral, dtype=spec.dtype)
    value.shape = onnx_ir.Shape(list(spec.shape))
    value.const_value = tensor_adapters.TorchTensor(default.detach().contiguous(), name=spec.name)
    model.graph.initializers[spec.name] = value
