"""The driver: what each command does, from paths to a report. The command line and scripts call these functions.

driver.apply("mam", "model_dir", "peftc-out", sets={"r": "64"})
driver.merge("peftc-out", "merged", export={"hf", "onnx"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.progress import NullProgress, Progress
from peftc.reports import ApplyReport, MergeReport, PlanReport, ScheduleReport, SitesReport

if TYPE_CHECKING:
    from peftc.frontend.trace import Skeleton
    from peftc.hotswap.report import AdaptersReport
    from peftc.ir.program import Program
    from peftc.merging.extraction import ExtractReport
    from peftc.merging.unmerge import UnmergeReport
    from peftc.merging.verify import VerifyReport
    from peftc.store.model_dir import ModelDir


def sites(model_dir: str | Path, head: str | None = None, num_labels: int | None = None) -> SitesReport:
    """What a rule can reach in the model."""
    base, _, program = _program(model_dir, head, num_labels, NullProgress())
    return SitesReport(base.path, program)


def plan(
    rule: str | Path,
    model_dir: str | Path,
    sets: Mapping[str, object] | None = None,
    head: str | None = None,
    num_labels: int | None = None,
) -> PlanReport:
    """What `apply` would do, and what would fold and how; nothing is written."""
    from peftc.lang.loader import load_rule
    from peftc.passes.fold import analyse_folds
    from peftc.pipeline import rewrite
    from peftc.planning.counts import counts_of
    from peftc.runtime.api import new_parameters

    resolved = load_rule(rule, sets)
    base, skeleton, program = _program(model_dir, head, num_labels, NullProgress())
    result = rewrite(program, resolved, fresh=new_parameters(base, skeleton))
    return PlanReport(base.path, result, counts_of(result, program), analyse_folds(program))


def apply(
    rule: str | Path,
    model_dir: str | Path,
    out: str | Path,
    *,
    sets: Mapping[str, object] | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ApplyReport:
    """Rewrite the model's graph by `rule` and write the delta directory `out`.

    Of the base's weights only those are read that an `init` of the rule names, one at a time.
    """
    from peftc.lang.loader import load_rule
    from peftc.pipeline import rewrite
    from peftc.planning.counts import counts_of
    from peftc.runtime.api import base_reference, new_parameters
    from peftc.runtime.delta_dir import refuse_trained, write_directory
    from peftc.runtime.init import Initializer
    from peftc.runtime.saved import SavedDeltas
    from peftc.store.atomic import check_target
    from peftc.store.base_weights import BaseWeights
    from peftc.store.model_dir import ModelDir
    from peftc.store.safetensors_io import TensorSpec, dtype_code

    progress = progress or NullProgress()
    resolved = load_rule(rule, sets)
    check_target(out, replace=True)
    refuse_trained(Path(out))
    saved = SavedDeltas(ModelDir.open(model_dir))
    saved.check(resolved)
    base, skeleton, program = _program(model_dir, head, num_labels, progress)
    progress.step(f"insert {resolved.name}")
    result = rewrite(program, resolved, fresh=new_parameters(base, skeleton))
    entries = [TensorSpec(p.name, dtype_code(p.dtype), p.shape) for p in result.parameters.values()]
    progress.step(f"write {out}")

    def support(fresh: Path) -> None:
        base.copy_support_files(fresh)
        skeleton.model.config.save_pretrained(fresh)

    write_directory(
        Path(out),
        plan=result,
        base=base_reference(base, head, num_labels, seed),
        entries=entries,
        produce=Initializer(result.parameters, seed, BaseWeights(base, skeleton.model), saved),
        support=support,
        progress=progress.update,
    )
    return ApplyReport(Path(out), result, counts_of(result, program))


def merge(
    directory: str | Path,
    out: str | Path,
    *,
    export: set[str] | None = None,
    base: str | Path | None = None,
    precision: str = "float32",
    max_shard: int | None = None,
    outputs: bool = True,
    texts: Sequence[str] = (),
    allow_unchanged: bool = False,
    undo: bool = False,
    tied: str = "refuse",
    opset: int | None = None,
    dtype: str | None = None,
    optimize: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> MergeReport:
    """Fold a delta directory into its base and write the result to `out`, with a certificate.

    `precision` is what folds are computed in, `max_shard` the largest shard in bytes (default: the base's own shards),
    `texts` what the outputs are compared on beside random inputs; without `outputs` only tensors are certified. With
    `undo`, what `unmerge` restores the base from is kept beside the checkpoint. `tied` says what becomes of a tied
    weight that a delta changes under one of its names: "refuse", "untie" or "both".
    `opset`, `dtype` ("float16"), `optimize` ("ort", "portable") and `cache` are those of an ONNX export
    (`peftc.merging.exporting.OnnxOptions`).
    """
    import torch

    from peftc.merging.exporting import OnnxOptions
    from peftc.merging.merge import Options
    from peftc.merging.merge import merge as run

    exact: torch.dtype = getattr(torch, precision)
    onnx = OnnxOptions(opset, None if dtype is None else getattr(torch, dtype), optimize, cache)
    options = Options(
        frozenset(export or {"hf"}), exact, max_shard, outputs, tuple(texts), allow_unchanged, tied, undo, onnx
    )
    return run(Path(directory), Path(out), base=base, progress=progress or NullProgress(), options=options)


def merge_schedule(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    max_shard: int | None = None,
    tied: str = "refuse",
    progress: Progress | None = None,
) -> ScheduleReport:
    """What `merge` would write, shard by shard; nothing is."""
    from peftc.merging.merge import Options, schedule

    return schedule(Path(directory), base, progress or NullProgress(), Options(max_shard=max_shard, tied=tied))


def export_adapters(
    directories: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    texts: Sequence[str] = (),
    progress: Progress | None = None,
) -> AdaptersReport:
    """Write one ONNX model of a base whose deltas are optional inputs, and an adapter file for each delta directory."""
    from peftc.hotswap.export import export_adapters as run

    places = [Path(directory) for directory in directories]
    return run(places, Path(out), base=base, progress=progress or NullProgress(), texts=tuple(texts))


def verify(directory: str | Path, base: str | Path | None = None, progress: Progress | None = None) -> VerifyReport:
    """Check a directory that `merge` wrote against its certificate."""
    from peftc.merging.verify import verify as run

    return run(Path(directory), base, progress or NullProgress())


def unmerge(directory: str | Path, out: str | Path, progress: Progress | None = None) -> UnmergeReport:
    """Restore the base's exact bytes from what `merge` wrote with `undo`."""
    from peftc.merging.unmerge import unmerge as run

    return run(Path(directory), Path(out), progress or NullProgress())


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    drop_others: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write what `tuned` changed of `base` as a delta directory of `rank`, or of the ranks that miss at most `error` of
    each change; what is no weight of a linear layer is kept whole, or dropped."""
    from peftc.merging.extract import Wanted
    from peftc.merging.extract import extract as run

    return run(base, tuned, Path(out), Wanted(rank, error, drop_others), progress or NullProgress())


def _program(
    model_dir: str | Path, head: str | None, num_labels: int | None, progress: Progress
) -> tuple[ModelDir, Skeleton, Program]:
    from peftc.frontend.trace import build_skeleton, default_inputs
    from peftc.pipeline import analyse
    from peftc.runtime.quantized import refuse_quantized_checkpoint
    from peftc.store.heads import resolve
    from peftc.store.model_dir import ModelDir

    base = ModelDir.open(model_dir)
    base.refuse_adapted()
    refuse_quantized_checkpoint(base.config, base.path)
    cls, config = resolve(base.config, base.path, head, num_labels)
    progress.step(f"trace {cls.__name__}")
    skeleton = build_skeleton(cls, config)
    return base, skeleton, analyse(skeleton, default_inputs(skeleton.model))
