"""The ONNX backend: the folded graph as `model.onnx` with its weights beside it, config and tokenizer.

Batch and sequence are symbolic; weights keep the checkpoint's names; what did not fold is an ordinary part of the
graph. The graph is made without weights (`peftc.backends.onnx_graph`), which are then streamed into their file
(`peftc.backends.onnx_weights`). The caller checks parity in onnxruntime (`peftc.merging.certify`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.backends.onnx_finish import float_ends, save_for_onnxruntime
from peftc.backends.onnx_graph import name_inputs, onnx_graph
from peftc.backends.onnx_weights import Weights, WeightsFile
from peftc.diagnostics import fail
from peftc.frontend.trace import InputSpec, default_inputs, forward_arguments
from peftc.ir.program import results
from peftc.store.atomic import check_free_space

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
    """What was written: the graphs, of which `path` is the first, and what goes into and comes out of that.

    `cached`: keys and values of past tokens go in and out. `cache` says why they do not, where they might.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    nodes: int
    graphs: tuple[str, ...] = (MODEL,)
    cached: bool = False
    cache: str = ""

    def describe(self) -> str:
        """Inputs and outputs of the first graph; those of the cache as one."""
        told = []
        for word, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            short = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
            told.append(f"{word} {', '.join(short)}")
        return "; ".join(told)


@dataclass(frozen=True, slots=True)
class Part:
    """One graph of an export: its file, its program, the program's inputs and what they are called in the file.

    An input among `empty` is none in the file: it is a tensor without rows there, a past before the first token.
    """

    file: str
    program: Program
    specs: Mapping[str, InputSpec]
    outputs: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    empty: frozenset[str] = frozenset()


def emit(
    directory: Path,
    program: Program,
    specs: Mapping[str, InputSpec],
    weights: Weights,
    *,
    opset: int = DEFAULT_OPSET,
    progress: Callable[[int, int], None] | None = None,
) -> OnnxFiles:
    """Write the program with its `weights` into `directory`; see `emit_parts`."""
    return emit_parts(
        directory, [Part(MODEL, program, specs, output_names(program))], weights, opset=opset, progress=progress
    )


def emit_parts(
    directory: Path,
    parts: Sequence[Part],
    weights: Weights,
    *,
    opset: int = DEFAULT_OPSET,
    fused: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> OnnxFiles:
    """Write graphs that share one file of weights. Raises `PeftcError` E014, E036, E043, and what `weights` does.

    Memory: a graph, and some blocks of weights (all of one where a fold needs all of it); all of the model where it is
    `fused` into ops of onnxruntime's own, and each graph has a file of weights then.
    """
    states = {part.file: state_shapes(part.program) for part in parts}
    check_dtypes(opset, {dtype for known in states.values() for _, dtype in known.values()})
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for known in states.values()
             for name, (shape, dtype) in known.items()}  # fmt: skip
    check_free_space(directory, sum(sizes.values()) * (2 if fused else 1))
    models: list[ir.Model] = []
    weights_file = f"unfused-{WEIGHTS}" if fused else WEIGHTS
    with WeightsFile(directory, weights_file, weights, progress, sum(sizes.values())) as file:
        for part in parts:
            model = onnx_graph(part.program, part.specs, part.outputs, opset)
            name_inputs(model, part.renamed, part.empty)
            file.fill(model, states[part.file])
            float_ends(model)
            models.append(model)
    for part, model in zip(parts, models, strict=True):
        save_graph(model, directory / part.file, fused=fused)
    if fused:
        (directory / weights_file).unlink(missing_ok=True)
    first = models[0].graph
    inputs = tuple(str(value.name) for value in first.inputs)
    outputs = tuple(str(value.name) for value in first.outputs)
    nodes = sum(len(list(model.graph)) for model in models)
    return OnnxFiles(directory / parts[0].file, inputs, outputs, opset, nodes, tuple(part.file for part in parts))


def check_kernels(program: Program, opset: int) -> None:
    """`check_dtypes` of the program's parameters and buffers."""
    check_dtypes(opset, {dtype for _, dtype in state_shapes(program).values()})


def check_dtypes(opset: int, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse an opset that the exporter does not write right, and dtypes without kernels: E014, E043."""
    if opset not in OPSETS:
        fail("E014", f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    for dtype, word in _NO_KERNELS.items():
        if dtype in dtypes:
            fail(
                "E043",
                f"onnxruntime has no {word} kernels on the CPU",
                help="pass `--dtype fp32`, or `--dtype fp16` for half the size; weights are cast as they are written",
            )


def state_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every parameter and buffer of the program."""
    return {
        binding.name: (tuple(int(size) for size in node.meta["val"].shape), node.meta["val"].dtype)
        for node, binding in program.bindings.items()
        if binding.kind in ("parameter", "buffer")
    }


def save_graph(model: ir.Model, path: Path, *, fused: bool = False) -> Path:
    """Write the graph, whose weights are in their file already, and check it: the exporter's own check checks nothing.

    Raises `onnx.checker.ValidationError` for a graph that is no valid ONNX, which is a bug.
    """
    import onnx
    import onnx_ir

    if fused:
        save_for_onnxruntime(model, path)  # ops that the checker does not know
    else:
        onnx_ir.save(model, path)
        onnx.checker.check_model(str(path), full_check=False)
    return path


def output_names(program: Program) -> tuple[str, ...]:
    """The output class's field names; entries of a tuple field are numbered. A plain number is no output of ONNX."""
    spec = program.exported.call_spec.out_spec
    assert spec is not None
    names: list[str] = []
    keys: list[Any] = list(spec.context) if spec.context and isinstance(spec.context, (list, tuple)) else []
    for key, child in zip(keys, spec.children(), strict=False):
        leaves = child.num_leaves
        names.extend([str(key)] if leaves == 1 else [f"{key}.{i}" for i in range(leaves)])
    names = names or [f"output_{i}" for i in range(spec.num_leaves)]
    return tuple(n for n, value in zip(names, results(program.graph), strict=True) if isinstance(value, torch.fx.Node))
