"""Merging: a delta directory and its base become a plain checkpoint, an ONNX model, or both, with a certificate.

Everything is written into a sibling of the destination and compared there with the unfolded model; the destination
appears when it is whole and right. A checkpoint is streamed: the memory it takes does not grow with the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftc.backends import hf, onnx
from peftc.backends.pt2 import require_compiler
from peftc.backends.settings import Settings, settings_for
from peftc.diagnostics import fail
from peftc.fold.decide import Room
from peftc.fold.evaluate import Read
from peftc.fold.state import FoldedState
from peftc.frontend.trace import InputSpec, Skeleton, build_skeleton, default_inputs, tied_names
from peftc.merging.adapted import Adapted
from peftc.merging.certificate import (
    CERTIFICATE,
    certificate,
    delta_digests,
    file_digest,
    refuse_nothing,
    refuse_unread,
)
from peftc.merging.certify import refuse_failed
from peftc.merging.comparing import compare_checkpoint
from peftc.merging.comparing_onnx import compare_onnx
from peftc.merging.exporting import OnnxOptions, export_onnx
from peftc.merging.merge_torch import TARGETS, write_torch
from peftc.merging.undo import UNDO, write_undo
from peftc.passes.fold import Fold
from peftc.progress import Progress
from peftc.reports import MergeReport, ScheduleReport
from peftc.store.atomic import atomic_directory, check_free_space, check_target

if TYPE_CHECKING:
    from peftc.ir.program import Program
    from peftc.planning.plan import Plan
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
    tied: str = "refuse"
    """What becomes of a tied weight that a delta changes under one of its names: "refuse", "untie" or "both"."""
    undo: bool = False
    """Whether to keep what `peftc unmerge` restores the base from."""
    onnx: OnnxOptions = field(default_factory=OnnxOptions)


@dataclass(slots=True)
class _Folded:
    """A folded program, with what was planned and where its tensors are."""

    program: Program
    plan: Plan
    fold: Fold
    read: Unfolded
    settings: Settings = field(default_factory=Settings)


def merge(
    directory: Path, out: Path, *, base: str | Path | None, progress: Progress, options: Options | None = None
) -> MergeReport:
    """Fold and write; see `peftc.driver.merge`. Raises `PeftcError` E014, E030 to E040, E042, E043, E049."""
    options = options or Options()
    if options.undo and "hf" not in options.export:
        fail("E014", "`--undo` keeps what a checkpoint changed, and none is written", help="add `--export hf`")
    if "aoti" in options.export:
        require_compiler()
    progress.step("read the delta")
    adapted = Adapted.open(directory, base)
    _check_places(directory, adapted, out)
    digests = delta_digests(adapted.delta)
    progress.step("fold")
    folded = _fold_for_checkpoint(adapted, options)
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
            if options.outputs and _ties_changed(adapted, folded, options):
                report.notes.append("outputs were not compared: a tied weight was changed on both sides, as asked")
            elif options.outputs:
                progress.step("compare with the unfolded model")
                report.comparisons += compare_checkpoint(adapted, fresh, options.texts)
        if "onnx" in options.export:
            _write_onnx(adapted, fresh, folded, report, progress, options)
        if options.export & TARGETS:
            write_torch(adapted, fresh, report, progress, options)
        refuse_failed(report.comparisons)
        document = certificate(adapted, report, digests)
        (fresh / CERTIFICATE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return report


def schedule(directory: Path, base: str | Path | None, progress: Progress, options: Options) -> ScheduleReport:
    """What a merge would read and write, shard by shard. Raises as `merge` does before it writes."""
    adapted = Adapted.open(directory, base)
    progress.step("fold")
    folded = _fold_for_checkpoint(adapted, options)
    return ScheduleReport(directory, folded.fold.decisions, _plan_checkpoint(adapted, folded, options))


def _check_places(directory: Path, adapted: Adapted, out: Path) -> None:
    for place, what in ((directory, "the delta directory"), (adapted.base.path, "the base model")):
        if out.resolve() == place.resolve():
            fail("E036", f"{out} is {what} itself", help="choose another directory with -o")
    check_target(out, replace=True)


def _fold(adapted: Adapted, specs: Mapping[str, InputSpec], skeleton: Skeleton | None = None) -> _Folded:
    program, plan = adapted.rewritten(specs, skeleton)
    fold = Fold()
    fold.apply(program)
    return _Folded(program, plan, fold, adapted.tensors(plan))


def _fold_for_checkpoint(adapted: Adapted, options: Options) -> _Folded:
    """The fold into a checkpoint: where its class can have a bias that a fold needs, or tied names apart, it may."""
    specs, skeleton = default_inputs(adapted.skeleton.model), adapted.skeleton
    if "hf" not in options.export:
        return _fold(adapted, specs)
    untied = settings_for(skeleton, untie=True) if options.tied == "untie" else Settings()
    if untied.apart:
        skeleton = build_skeleton(adapted.base_class, untied.applied(skeleton.config), adapted.dtype)
    folded = _fold(adapted, specs, skeleton)
    biased = settings_for(skeleton, biases={d.lacks for d in folded.fold.decisions if d.lacks})
    if biased.values or options.tied == "both":
        folded.fold = Fold(Room(biased.biases, ties=options.tied != "both"))
        folded.fold.apply(folded.program)
    if options.tied == "both":
        _refuse_doubled(adapted, folded)
    if not _tied_and_touched(adapted, folded):
        untied = Settings()  # nothing to take apart
    folded.settings = replace(biased, values={**biased.values, **untied.values}, apart=untied.apart)
    return folded


def _tied_and_touched(adapted: Adapted, folded: _Folded) -> set[str]:
    """Tied names that a fold changes."""
    tied = tied_names(adapted.skeleton.model)
    touched = {name for update in folded.fold.updates for name in update.touches}
    return touched & {*tied, *tied.values()}


def _refuse_doubled(adapted: Adapted, folded: _Folded) -> None:
    """Refuse deltas at two of the modules that share a tensor: it would take both changes. Raises `PeftcError` E037."""
    readers: dict[str, set[object]] = {}
    for decision in folded.fold.decisions:
        tap = decision.insertion.site.taps[decision.insertion.tap]
        name = folded.program.parameter_name(tap.node) if decision.into is None else decision.into.weight_name
        if decision.folds and name is not None:
            readers.setdefault(name, set()).add(tap.user if decision.into is None else decision.into.node)
    doubled = [name for name in _tied_and_touched(adapted, folded) if len(readers.get(name, ())) > 1]
    if doubled:
        message = f"deltas of two modules change {doubled[0]}, which is one tensor for both"
        fail("E037", message, help="`--tied untie` writes two tensors")


def _ties_changed(adapted: Adapted, folded: _Folded, options: Options) -> bool:
    return options.tied == "both" and bool(_tied_and_touched(adapted, folded))


def _plan_checkpoint(adapted: Adapted, folded: _Folded, options: Options) -> hf.CheckpointPlan:
    hf.refuse_kept(folded.fold.decisions)
    return hf.plan_checkpoint(
        source=adapted.base,
        skeleton=adapted.skeleton,
        program=folded.program,
        decisions=folded.fold.decisions,
        folded=FoldedState(_created(adapted, folded), folded.fold.updates, options.precision),
        trained=folded.plan.trained,
        max_shard=options.max_shard,
        settings=folded.settings,
    )


def _created(adapted: Adapted, folded: _Folded) -> Read:
    """Reads zeros for parameters that the settings give the class."""
    zeros, read, dtype = folded.settings.zeros, folded.read, adapted.skeleton.model.dtype
    return lambda name: torch.zeros(zeros[name], dtype=dtype) if name in zeros else read(name)


def _write_onnx(
    adapted: Adapted, fresh: Path, folded: _Folded, report: MergeReport, progress: Progress, options: Options
) -> None:
    progress.step("export ONNX")
    tokens = onnx.tokenizer_inputs(adapted.base)
    written = export_onnx(adapted, fresh, folded.plan, tokens, options.precision, options.onnx, progress)
    report.onnx = written.files
    refuse_unread(adapted.delta, written.read, folded.plan)
    if not (fresh / "config.json").exists():
        adapted.base.copy_support_files(fresh)
        adapted.skeleton.config.save_pretrained(fresh)
    if options.outputs:
        progress.step("compare onnxruntime with torch")
        report.comparisons += compare_onnx(adapted, written.files, written.specs, options.texts, options.onnx.dtype)
    report.files |= {path.name: file_digest(path) for path in sorted(fresh.glob("*.onnx*"))}
    report.exported = {decision.insertion.delta: decision.result for decision in written.decisions}


def _write_undo(
    adapted: Adapted, fresh: Path, plan: hf.CheckpointPlan, written: hf.Checkpoint, progress: Progress
) -> Path:
    touched = {change.name for change in written.changes}
    return write_undo(adapted.base, fresh, plan.tensors.factors, touched, progress.update)
