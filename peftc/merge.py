"""Merging: a delta directory and its base become a plain checkpoint, an ONNX model, or both, with a certificate.

Everything is written into a sibling of the destination and compared there with the unfolded model; the destination
appears when it is whole and right. A checkpoint is streamed: the memory it takes does not grow with the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftc.adapted import Adapted
from peftc.backends import hf, onnx
from peftc.backends.onnx_weights import FoldedWeights
from peftc.certificate import CERTIFICATE, certificate, delta_digests, file_digest, refuse_nothing, refuse_unread
from peftc.certify import refuse_failed
from peftc.comparing import compare_checkpoint
from peftc.comparing_onnx import compare_onnx
from peftc.diagnostics import fail
from peftc.fold.program_state import folded_program
from peftc.fold.state import FoldedState
from peftc.frontend.trace import InputSpec, default_inputs
from peftc.passes.fold import Fold
from peftc.progress import Progress
from peftc.reports import MergeReport, ScheduleReport
from peftc.store.atomic import atomic_directory, check_free_space, check_target
from peftc.undo import UNDO, write_undo

if TYPE_CHECKING:
    from peftc.ir.program import Program
    from peftc.plan import Plan
    from peftc.runtime.unfolded import Unfolded


@dataclass(frozen=True, slots=True)
class Options:
    """How to merge: `precision` is what folds are computed in, `max_shard` the bytes of a shard (None: as the base's),
    `outputs` whether the outputs are compared, `texts` on what beside random inputs."""

    export: frozenset[str] = frozenset({"hf"})
    precision: torch.dtype = torch.float32
    max_shard: int | None = None
    outputs: bool = True
    texts: tuple[str, ...] = ()
    allow_unchanged: bool = False
    undo: bool = False
    """Whether to keep what `peftc unmerge` restores the base from."""


@dataclass(slots=True)
class _Folded:
    """A folded program, with what was planned and where its tensors are."""

    program: Program
    plan: Plan
    fold: Fold
    read: Unfolded


def merge(
    directory: Path, out: Path, *, base: str | Path | None, progress: Progress, options: Options | None = None
) -> MergeReport:
    """Fold and write; see `peftc.driver.merge`. Raises `PeftcError` E014, E030 to E040, E042, E043, E049."""
    options = options or Options()
    if options.undo and "hf" not in options.export:
        fail("E014", "`--undo` keeps what a checkpoint changed, and none is written", help="add `--export hf`")
    progress.step("read the delta")
    adapted = Adapted.open(directory, base)
    _check_places(directory, adapted, out)
    digests = delta_digests(adapted.delta)
    progress.step("fold")
    folded = _fold(adapted, default_inputs(adapted.skeleton.model))
    plan = _plan_checkpoint(adapted, folded, options) if "hf" in options.export else None
    with atomic_directory(out, replace=True) as fresh:
        report = MergeReport(out, folded.fold.decisions, folded.plan)
        if plan is not None:
            check_free_space(out, plan.nbytes)
            progress.step("write checkpoint")
            report.checkpoint = plan.write(fresh, progress.update)
            refuse_unread(adapted.delta, folded.read, folded.plan)
            refuse_nothing(report.checkpoint, allowed=options.allow_unchanged)
            if options.undo:
                progress.step("keep what undoes it")
                undo = _write_undo(adapted, fresh, plan, report.checkpoint, progress)
                report.undo, report.files[UNDO] = undo.stat().st_size, file_digest(undo)
            if options.outputs:
                progress.step("compare with the unfolded model")
                report.comparisons += compare_checkpoint(adapted, fresh, options.texts)
        if "onnx" in options.export:
            _write_onnx(adapted, fresh, report, progress, options)
        refuse_failed(report.comparisons)
        document = certificate(adapted, report, digests)
        (fresh / CERTIFICATE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return report


def schedule(directory: Path, base: str | Path | None, progress: Progress, options: Options) -> ScheduleReport:
    """What a merge would read and write, shard by shard. Raises as `merge` does before it writes."""
    adapted = Adapted.open(directory, base)
    progress.step("fold")
    folded = _fold(adapted, default_inputs(adapted.skeleton.model))
    return ScheduleReport(directory, folded.fold.decisions, _plan_checkpoint(adapted, folded, options))


def _check_places(directory: Path, adapted: Adapted, out: Path) -> None:
    for place, what in ((directory, "the delta directory"), (adapted.base.path, "the base model")):
        if out.resolve() == place.resolve():
            fail("E036", f"{out} is {what} itself", help="choose another directory with -o")
    check_target(out, replace=True)


def _fold(adapted: Adapted, specs: Mapping[str, InputSpec]) -> _Folded:
    program, plan = adapted.rewritten(specs)
    fold = Fold()
    fold.apply(program)
    return _Folded(program, plan, fold, adapted.tensors(plan))


def _plan_checkpoint(adapted: Adapted, folded: _Folded, options: Options) -> hf.CheckpointPlan:
    hf.refuse_kept(folded.fold.decisions)
    return hf.plan_checkpoint(
        source=adapted.base,
        skeleton=adapted.skeleton,
        program=folded.program,
        decisions=folded.fold.decisions,
        folded=FoldedState(folded.read, folded.fold.updates, options.precision),
        trained=folded.plan.trained,
        max_shard=options.max_shard,
    )


def _write_onnx(adapted: Adapted, fresh: Path, report: MergeReport, progress: Progress, options: Options) -> None:
    progress.step("export ONNX")
    specs = onnx.export_inputs(adapted.skeleton, onnx.tokenizer_inputs(adapted.base))
    folded = _fold(adapted, specs)
    state = FoldedState(folded.read, folded.fold.updates, options.precision)
    program, constants = folded_program(folded.read, folded.program, state)
    weights = FoldedWeights(state, folded.read, constants)
    report.onnx = onnx.emit(fresh, program, specs, weights, progress=progress.update)
    refuse_unread(adapted.delta, folded.read, folded.plan)
    if not (fresh / "config.json").exists():
        adapted.base.copy_support_files(fresh)
        adapted.skeleton.config.save_pretrained(fresh)
    if options.outputs:
        progress.step("compare onnxruntime with torch")
        report.comparisons += compare_onnx(adapted, report.onnx, specs, options.texts)
    report.files |= {path.name: file_digest(path) for path in sorted(fresh.glob(f"{onnx.MODEL}*"))}
    report.exported = {decision.insertion.delta: decision.result for decision in folded.fold.decisions}


def _write_undo(
    adapted: Adapted, fresh: Path, plan: hf.CheckpointPlan, written: hf.Checkpoint, progress: Progress
) -> Path:
    touched = {change.name for change in written.changes}
    return write_undo(adapted.base, fresh, plan.tensors.factors, touched, progress.update)
