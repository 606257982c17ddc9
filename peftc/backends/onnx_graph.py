"""The ONNX graph of a program, made without its weights: parameters are fake, and initializers are left to be filled.

    model = onnx_graph(program, {"input_ids": InputSpec(torch.long, ("batch", "sequence"))}, ("logits",), 20)
    model.graph.initializers["lm_head.weight"].const_value     # no data: see `peftc.backends.onnx_weights`

Initializers have the names of the program's state; the exporter's optimizer, which folds weights and loses their names,
is not used. What is simpler without touching a weight is made so.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from peftc.backends.onnx_repairs import repair
from peftc.diagnostics import fail
from peftc.passes.set_mode import SetMode
from peftc.runtime.executor import move_to

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

    from peftc.frontend.trace import InputSpec
    from peftc.ir.program import Program

AXES = {
    "batch": "batch_size", "sequence": "sequence_length", "target": "decoder_sequence_length",
    "past": "past_sequence_length", "total": "total_sequence_length",
}  # fmt: skip
"""What the axes of inputs are called in a file."""


def onnx_graph(program: Program, specs: Mapping[str, InputSpec], outputs: Sequence[str], opset: int) -> ir.Model:
    """The program in evaluation mode as an ONNX model whose parameters and buffers hold no data.

    Inputs keep the names of the program's; `specs` name their axes. Changes `program`. Raises `PeftcError` E043.
    """
    SetMode(training=False).apply_to(program.graph)
    move_to(program.graph, torch.device("cpu"))
    repair(program.graph)
    exported = _called_by_name(program.to_exported(_fake_state(program)))
    with quiet_exporter():
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, "cpu")
        model = _translated(exported, opset)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    _name_axes(model, specs)
    _clean(model)
    return model


def _called_by_name(exported: ExportedProgram) -> ExportedProgram:
    """Say how the graph is called as it stands: a part of a traced model has other inputs and outputs than that had."""
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.utils import _pytree as pytree

    signature = exported.graph_signature
    inputs = pytree.tree_flatten(((), dict.fromkeys(signature.user_inputs, 0)))[1]
    outputs = pytree.tree_flatten((0,) * len(signature.user_outputs))[1]
    exported._module_call_graph = [ModuleCallEntry("", ModuleCallSignature([], [], inputs, outputs))]
    return exported


def name_inputs(model: ir.Model, renamed: Mapping[str, str], empty: Collection[str]) -> None:
    """Call the inputs as `renamed` says; those among `empty` are made in the graph, [batch, heads, 0, width]."""
    import onnx_ir as ir

    inputs = model.graph.inputs
    batch = next(value for value in inputs if value.name not in empty)
    for value in [value for value in inputs if value.name in empty]:
        made = _without_rows(model.graph, batch, value)
        ir.convenience.replace_all_uses_with(value, made)
        inputs.remove(value)
    for value in inputs:
        value.name = renamed.get(str(value.name), value.name)


def _without_rows(graph: ir.Graph, batch: ir.Value, like: ir.Value) -> ir.Value:
    """A tensor of the rank and dtype of `like`, the batch of `batch` and no rows."""
    import numpy as np
    import onnx_ir as ir

    assert like.shape is not None and like.dtype is not None
    _, heads, _, width = like.shape
    size = ir.Node("", "Shape", [batch], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)])
    rest = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array([heads, 0, width])))])
    shape = ir.Node("", "Concat", [size.outputs[0], rest.outputs[0]], [ir.AttrInt64("axis", 0)])
    zero = ir.tensor(np.zeros(1, like.dtype.numpy()))
    made = ir.Node("", "ConstantOfShape", [shape.outputs[0]], [ir.AttrTensor("value", zero)])
    for node, name in zip((size, rest, shape, made), ("batch", "rest", "shape", "none"), strict=True):
        node.outputs[0].name = f"{like.name}_{name}"
    graph.insert_before(graph[0], (size, rest, shape, made))
    return made.outputs[0]


def _fake_state(program: Program) -> dict[str, torch.Tensor]:
    """Parameters and buffers with shapes and dtypes, and no memory."""
    state: dict[str, torch.Tensor] = {}
    with program.fake_mode:
        for node, binding in program.bindings.items():
            if binding.kind in ("parameter", "buffer"):
                like = node.meta["val"]
                state[binding.name] = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    return state


def _translated(exported: ExportedProgram, opset: int) -> ir.Model:
    """Raises `PeftcError` E043 for an op that ONNX, or the exporter, has no counterpart of."""
    try:
        written = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            verbose=False,
            custom_translation_table=_translations(),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        fail("E043", f"the graph has no counterpart in ONNX: {reason}", help="merge into a checkpoint: `--export hf`")
    assert written is not None
    return written.model


def _translations() -> dict[Any, Any]:
    """How ops of transformers' own are written in ONNX: products of rows with the weights of their experts."""
    from transformers.exporters import exporter_onnx

    table: dict[Any, Any] = getattr(exporter_onnx, "_ONNX_TRANSLATION_TABLE", {})
    return {op: function for op, function in table.items() if "grouped_mm" in str(op)}


def _name_axes(model: ir.Model, specs: Mapping[str, InputSpec]) -> None:
    """Call the symbols of inputs by the names of their axes, here and wherever else they stand."""
    import onnx_ir as ir

    named: dict[str, str] = {}
    for value in model.graph.inputs:
        sizes = specs[str(value.name)].sizes if value.name in specs else ()
        for dim, axis in zip(value.shape or (), sizes, strict=False):
            if isinstance(dim, ir.SymbolicDim) and isinstance(axis, str):
                named[str(dim.value)] = AXES.get(axis, axis)
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, named) for dim in value.shape])


def _renamed(dim: Any, named: Mapping[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    words = re.sub(r"\w+", lambda word: named.get(word[0], word[0]), str(dim.value))
    past, new = AXES["past"], AXES["sequence"]
    return AXES["total"] if words in (f"{past} + {new}", f"{new} + {past}") else words


def _clean(model: ir.Model) -> None:
    """Drop what computes nothing, what is computed twice, and the exporter's notes; initializers stay as they are."""
    from onnx_ir.passes import Sequential
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, IdentityEliminationPass, RemoveUnusedNodesPass

    Sequential(IdentityEliminationPass(), CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass())(model)
    for item in (*model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        for key in [key for key in item.metadata_props if key != _SCOPES]:
            del item.metadata_props[key]  # traces of the exporter's own code, with paths of this machine


_SCOPES = "pkg.torch.onnx.name_scopes"
"""Which module a node is from."""


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter reports its progress and its own deprecations; neither is the user's business."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
