"""The ONNX backend: the folded graph as `model.onnx` with its weights beside it, config and tokenizer.

Batch and sequence are symbolic; weights keep their state-dict names; what did not fold is an ordinary part of the
graph. The caller checks parity in onnxruntime (`peftc.certify`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.diagnostics import fail
from peftc.frontend.trace import InputSpec, default_inputs, forward_arguments
from peftc.passes.set_mode import SetMode
from peftc.runtime.executor import move_to

if TYPE_CHECKING:
    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program

name = "onnx"

OPSETS = range(18, 26)
DEFAULT_OPSET = 20
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"

_AXES = {"batch": "batch_size", "sequence": "sequence_length", "target": "decoder_sequence_length"}
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
    state: Mapping[str, torch.Tensor],
    *,
    opset: int = DEFAULT_OPSET,
) -> OnnxFiles:
    """Write the program, bound to `state`, into `directory`. Raises `PeftcError` E014, E043."""
    import onnx
    import onnx_ir

    if opset not in OPSETS:
        fail("E014", f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    dtypes = {value.dtype for value in state.values()}
    for dtype, word in _NO_KERNELS.items():
        if dtype in dtypes:
            fail(
                "E043",
                f"onnxruntime has no {word} kernels on the CPU",
                help="load the base in float32: save it once with `dtype=float32`, or export on float16",
            )
    SetMode(training=False).apply_to(program.graph)
    move_to(program.graph, torch.device("cpu"))
    outputs = output_names(program)
    exported = program.to_exported(state)
    axes = {n: {i: _AXES[s] for i, s in enumerate(spec.sizes) if isinstance(s, str)} for n, spec in specs.items()}
    with _quiet():
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, "cpu")
        written = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            dynamic_shapes=axes,
            input_names=list(specs),
            output_names=list(outputs),
            verbose=False,
            custom_translation_table=_translations(),
        )
    assert written is not None
    path = directory / MODEL
    onnx_ir.save(written.model, path, external_data=WEIGHTS)
    onnx.checker.check_model(str(path), full_check=False)
    return OnnxFiles(path, tuple(specs), outputs, opset, len(list(written.model.graph)))


def _translations() -> dict[Any, Any]:
    """How ops of transformers' own are written in ONNX: products of rows with the weights of their experts."""
    from transformers.exporters import exporter_onnx

    table: dict[Any, Any] = getattr(exporter_onnx, "_ONNX_TRANSLATION_TABLE", {})
    return {op: function for op, function in table.items() if "grouped_mm" in str(op)}


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
