"""What may be done to a graph when its weights are in their file: float32 at its ends, and ops of onnxruntime's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_CACHE = ("past_key_values.", "present.")


def float_ends(model: ir.Model) -> None:
    """Take and give float32 in a graph of float16: what callers make and read. Keys and values stay as they are."""
    import onnx_ir as ir

    graph = model.graph
    for place, value in enumerate(graph.inputs):
        if value.dtype == ir.DataType.FLOAT16 and not str(value.name).startswith(_CACHE):
            outer = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            inner = _cast(outer, ir.DataType.FLOAT16, f"{value.name}_fp16")
            ir.convenience.replace_all_uses_with(value, inner.outputs[0])
            graph.inputs[place] = outer
            graph.insert_before(graph[0], inner)
    for place, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.FLOAT16 and not str(value.name).startswith(_CACHE):
            name, value.name = str(value.name), f"{value.name}_fp16"
            node = _cast(value, ir.DataType.FLOAT, name)
            node.outputs[0].shape = value.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    import onnx_ir as ir

    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))])
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(to)
    return node


def save_for_onnxruntime(model: ir.Model, path: Path) -> None:
    """Write the graph in ops of onnxruntime's own (`com.microsoft`), its weights in a file beside it.

    Attention, norms and their kin become one op each, and linear weights are stored transposed, under other names. All
    of the model is in memory meanwhile.
    """
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    from peftc.backends.onnx_graph import quiet_exporter

    with quiet_exporter():
        found = optimize_for_ort(model)
    ir.save(found[0] if isinstance(found, tuple) else found, path, external_data=f"{path.name}.data")
