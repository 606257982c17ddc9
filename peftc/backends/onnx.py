"""The ONNX backend: the folded graph as `model.onnx` with its weights beside it, config and tokenizer.

Batch and sequence are symbolic; weights keep the checkpoint's names; what did not fold is an ordinary part of the
graph. The graph is made without weights (`peftc.backends.onnx_graph`), which are then streamed into their file
(`peftc.backends.onnx_weights`). The caller checks parity in onnxruntime (`peftc.certify`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.backends.onnx_graph import onnx_graph
from peftc.backends.onnx_weights import Weights, WeightsFile
from peftc.diagnostics import fail
from peftc.frontend.trace import InputSpec, default_inputs, forward_arguments

if TYPE_CHECKING:
    import onnx_ir as ir

    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program
    from peftc.store.model_dir import ModelDir

name = "onnx"

OPSETS = range(18, 26)
DEFAULT_OPSET = 20
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"

_NO_KERNELS = {torch.bfloat16: "bfloat16"}


def export_inputs(skeleton: Skeleton, tokenizer_inputs: tuple[str, ...]) -> dict[str, InputSpec]:
    """The inputs of an export: the model's usual ones, what its tokenizer makes, and position ids of a decoder."""
    model = skeleton.model
    inputs = default_inputs(model)
    accepted = forward_arguments(type(model))
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        if "token_type_ids" in tokenizer_inputs and "token_type_ids" in accepted:
            inputs["token_type_ids"] = ids
        if "position_ids" in accepted and not model.config.is_encoder_decoder and model.can_generate():
            inputs["position_ids"] = ids
    return inputs


def tokenizer_inputs(source: ModelDir) -> tuple[str, ...]:
    """What the tokenizer beside a model makes; nothing where there is none that loads."""
    if not source.tokenizer_files or not (source.path / "tokenizer_config.json").exists():
        return ()
    from transformers import AutoTokenizer

    try:
        return tuple(AutoTokenizer.from_pretrained(source.path).model_input_names)
    except (OSError, ValueError):
        return ()


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """What was written."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    nodes: int


def emit(
    directory: Path,
    program: Program,
    specs: Mapping[str, InputSpec],
    weights: Weights,
    *,
    opset: int = DEFAULT_OPSET,
    progress: Callable[[int, int], None] | None = None,
) -> OnnxFiles:
    """Write the program with its `weights` into `directory`. Raises `PeftcError` E014, E043, and what `weights` does.

    Memory: the graph, and some blocks of weights (all of one where a fold needs all of it).
    """
    check_kernels(program, opset)
    outputs = output_names(program)
    states = state_shapes(program)
    model = onnx_graph(program, specs, outputs, opset)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in states.values())
    with WeightsFile(directory, WEIGHTS, weights, progress, total) as file:
        file.fill(model, states)
    path = save_graph(model, directory / MODEL)
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    return OnnxFiles(path, inputs, outputs, opset, len(list(model.graph)))


def check_kernels(program: Program, opset: int) -> None:
    """Refuse an opset that the exporter does not write right, and dtypes without kernels: E014, E043."""
    if opset not in OPSETS:
        fail("E014", f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    dtypes = {dtype for _, dtype in state_shapes(program).values()}
    for dtype, word in _NO_KERNELS.items():
        if dtype in dtypes:
            fail(
                "E043",
                f"onnxruntime has no {word} kernels on the CPU",
                help="load the base in float32: save it once with `dtype=float32`, or export on float16",
            )


def state_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every parameter and buffer of the program."""
    return {
        binding.name: (tuple(int(size) for size in node.meta["val"].shape), node.meta["val"].dtype)
        for node, binding in program.bindings.items()
        if binding.kind in ("parameter", "buffer")
    }


def save_graph(model: ir.Model, path: Path) -> Path:
    """Write the graph, whose weights are in their file already, and check it: the exporter's own check checks nothing.

    Raises `onnx.checker.ValidationError` for a graph that is no valid ONNX, which is a bug.
    """
    import onnx
    import onnx_ir

    onnx_ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=False)
    return path


def output_names(program: Program) -> tuple[str, ...]:
    """The output class's field names; entries of a tuple field are numbered."""
    spec = program.exported.call_spec.out_spec
    assert spec is not None
    names: list[str] = []
    keys: list[Any] = list(spec.context) if spec.context and isinstance(spec.context, (list, tuple)) else []
    for key, child in zip(keys, spec.children(), strict=False):
        leaves = child.num_leaves
        names.extend([str(key)] if leaves == 1 else [f"{key}.{i}" for i in range(leaves)])
    return tuple(names) or tuple(f"output_{i}" for i in range(spec.num_leaves))
