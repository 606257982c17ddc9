"""Merging into what torch reads by itself: an archive of torch.export, and a package compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftc.backends import onnx, pt2
from peftc.backends.onnx_weights import FoldedWeights
from peftc.fold.program_state import folded_program
from peftc.fold.state import FoldedState
from peftc.merging.certificate import file_digest, refuse_unread
from peftc.merging.certify import Comparison, compared
from peftc.merging.comparing import TOLERANCE, batches_for, tensors_of, vocabulary_of, word
from peftc.merging.comparing_onnx import in_torch
from peftc.passes.fold import Fold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peftc.frontend.trace import InputSpec
    from peftc.merging.adapted import Adapted
    from peftc.merging.merge import Options
    from peftc.progress import Progress
    from peftc.reports import MergeReport

TARGETS = frozenset({"pt2", "aoti"})


def write_torch(adapted: Adapted, fresh: Path, report: MergeReport, progress: Progress, options: Options) -> None:
    """Write what of `TARGETS` is asked for, read it again and compare. Raises `PeftcError` E031, E042, E049, E094."""
    progress.step("export torch")
    specs = onnx.export_inputs(adapted.skeleton, onnx.tokenizer_inputs(adapted.base))
    unfolded, plan = adapted.rewritten(specs)
    fold, read = Fold(), adapted.tensors(plan)
    fold.apply(unfolded)
    state = FoldedState(read, fold.updates, options.precision)
    program, constants = folded_program(read, unfolded, state)
    exported = pt2.emit(fresh, program, specs, FoldedWeights(state, read, constants))
    refuse_unread(adapted.delta, read, plan)
    paths = [fresh / pt2.ARCHIVE]
    if "aoti" in options.export:
        progress.step("compile")
        pt2.compile_ahead(fresh, exported)
        paths.append(fresh / pt2.PACKAGE)
    if "pt2" not in options.export:
        paths.pop(0).unlink()
    if not (fresh / "config.json").exists():
        adapted.base.copy_support_files(fresh)
        adapted.skeleton.config.save_pretrained(fresh)
    if options.outputs:
        progress.step("compare with torch")
        report.comparisons += [c for path in paths for c in _compare(adapted, path, specs, options)]
    report.files |= {path.name: file_digest(path) for path in paths}
    report.exported = {decision.insertion.delta: decision.result for decision in fold.decisions}


def _compare(adapted: Adapted, path: Path, specs: Mapping[str, InputSpec], options: Options) -> list[Comparison]:
    """What was written, as torch loads it, against the unfolded model."""
    batches = batches_for(adapted, specs, options.texts)
    wanted, run = in_torch(adapted, specs, [given for _, given in batches]), pt2.load(path)
    with torch.no_grad():
        found = [tensors_of(run(**{name: given[name] for name in specs})) for _, given in batches]
    return [
        compared(
            path.name, label, given, one, other, TOLERANCE[adapted.dtype], word(adapted.dtype), vocabulary_of(adapted)
        )
        for (label, given), one, other in zip(batches, wanted, found, strict=True)
    ]
