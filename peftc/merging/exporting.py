"""Exports to ONNX, step by step: choose the graphs, fold, write, finish, compare.

A model that generates is exported with a cache where model and rule admit one (`peftc.backends.onnx_generation`); where
they do not, or nobody wants it, the export is the one graph of a call without a cache, and the report says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftc.backends import onnx
from peftc.backends.genai import write_genai_config
from peftc.backends.onnx_generation import Graphs, cached_inputs, without_windows
from peftc.backends.onnx_weights import FoldedWeights
from peftc.diagnostics import PeftcError
from peftc.fold.program_state import folded_program
from peftc.fold.state import FoldedState
from peftc.frontend.cache import CacheLayout, cache_layout
from peftc.frontend.trace import InputSpec, Skeleton, build_skeleton, default_inputs
from peftc.ir.stepwise import across
from peftc.merging.adapted import Adapted
from peftc.passes.fold import Fold
from peftc.runtime.lengths import one_past

if TYPE_CHECKING:
    from peftc.fold.decide import Decision
    from peftc.ir.program import Program
    from peftc.planning.plan import Plan
    from peftc.progress import Progress
    from peftc.runtime.unfolded import Unfolded


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How to export: `dtype` of the weights (default: as the base is loaded), `cache` where there can be one.

    `optimize` is "ort" (ops of onnxruntime's own), "portable" (attention as one op of the standard, which came with
    opset 23) or None (the opset that most runtimes read).
    """

    opset: int | None = None
    dtype: torch.dtype | None = None
    optimize: str | None = None
    cache: bool = True

    @property
    def opset_or_default(self) -> int:
        return self.opset or (PORTABLE_OPSET if self.optimize == "portable" else onnx.DEFAULT_OPSET)


PORTABLE_OPSET = 23


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, what the fold decided, which tensors were read, and the inputs of a call without a cache."""

    files: onnx.OnnxFiles
    decisions: list[Decision]
    read: Unfolded
    specs: Mapping[str, InputSpec]


@dataclass(frozen=True, slots=True)
class _Traced:
    """A rewritten program, its inputs, and the layout of the cache among them; `why` there is none, in words."""

    program: Program
    plan: Plan
    specs: Mapping[str, InputSpec]
    layout: CacheLayout | None
    why: str = ""


def export_onnx(
    adapted: Adapted,
    directory: Path,
    like: Plan,
    tokenizer_inputs: tuple[str, ...],
    precision: torch.dtype,
    options: OnnxOptions,
    progress: Progress,
) -> Exported:
    """Write the ONNX files into `directory`. `like` is the plan of the first trace of the model.

    Raises `PeftcError` E014, E031, E038, E042, E043.
    """
    dtype = options.dtype or adapted.dtype
    opset = options.opset_or_default
    onnx.check_dtypes(opset, {dtype})
    skeleton = adapted.skeleton
    if dtype != adapted.dtype:
        skeleton = build_skeleton(adapted.base_class, adapted.skeleton.config, dtype)
    specs = onnx.export_inputs(skeleton, tokenizer_inputs)
    traced = _traced(adapted, skeleton, specs, like, options)
    fold, read = Fold(), adapted.tensors(traced.plan)
    fold.apply(traced.program)
    state = FoldedState(read, fold.updates, precision)
    program, constants = folded_program(read, traced.program, state)
    parts = [onnx.Part(onnx.MODEL, program, specs, onnx.output_names(program))]
    why = traced.why
    if traced.layout is not None:
        parts = Graphs(program, traced.specs, traced.layout).parts(skeleton.model.main_input_name)
    weights = FoldedWeights(state, read, constants)
    files = onnx.emit_parts(
        directory, parts, weights, opset=opset, fused=options.optimize == "ort", progress=progress.update
    )
    files = replace(files, cached=traced.layout is not None, cache=why)
    write_genai_config(directory, adapted.skeleton, files, traced.layout)
    return Exported(files, fold.decisions, read, specs)


def _traced(
    adapted: Adapted, skeleton: Skeleton, specs: Mapping[str, InputSpec], like: Plan, options: OnnxOptions
) -> _Traced:
    """With a cache where there can be one."""
    why = ""
    if options.cache and skeleton.model.can_generate():
        found = _with_cache(adapted, skeleton, specs, like)
        if isinstance(found, _Traced):
            return found
        why = found
    return _Traced(*adapted.rewritten(specs, skeleton), specs, None, why)


def _with_cache(adapted: Adapted, skeleton: Skeleton, specs: Mapping[str, InputSpec], like: Plan) -> _Traced | str:
    """The trace with a cache, or why there is none, in words."""
    try:
        layout = without_windows(cache_layout(skeleton, default_inputs(skeleton.model)))
        wanted = cached_inputs(specs, layout, skeleton.model.dtype)
        program, plan = adapted.rewritten(wanted, skeleton, layout, like)
        if (reason := across(program) or one_past(program)) is not None:
            return reason
        if layout.cross:
            Graphs(program, wanted, layout).parts(skeleton.model.main_input_name)  # whether it can be cut
    except PeftcError as error:
        if error.diagnostics[0].code not in ("E038", "E041"):
            raise
        return error.diagnostics[0].message
    return _Traced(program, plan, wanted, layout)
