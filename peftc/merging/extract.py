"""Extraction: what tuning changed, as a delta directory of low rank that `peftc merge` and `peftc.load` take.

Each linear layer whose weight changed gets the row `h + B A x`, with B A the truncated singular value decomposition of
the change (`peftc.merging.lowrank`). Whatever else changed (norms, biases, embeddings, a new head), and a weight for
which two factors would be no smaller, is kept whole under `train`. The rule that says so is written for the two
checkpoints at hand and planned on the base like any other; what would not fold again is kept whole too."""

from __future__ import annotations

import fnmatch
import glob
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.diagnostics import fail
from peftc.frontend.trace import default_inputs
from peftc.lang.loader import parse_rule
from peftc.merging.extraction import FILE, Extracted, ExtractReport
from peftc.merging.lowrank import LowRank, decompose, decompose_within
from peftc.merging.pairs import Pairs
from peftc.passes.fold import analyse_folds
from peftc.pipeline import analyse, rewrite
from peftc.progress import Progress
from peftc.runtime.api import base_reference
from peftc.runtime.delta_dir import refuse_trained, write_files
from peftc.store.atomic import atomic_directory, check_target
from peftc.store.safetensors_io import TensorSpec, dtype_code, read_tensor

if TYPE_CHECKING:
    from peftc.ir.sites import Linear, Site
    from peftc.planning.plan import Edit, Plan

_PATHS = 400
"""Paths of one row; a list of a rule may have some more."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Either a rank, or the share of each change's norm that may be missed. `drop` leaves out what is no matrix of a
    linear layer."""

    rank: int | None = None
    error: float | None = None
    drop: bool = False


def extract(base: str | Path, tuned: str | Path, out: Path, wanted: Wanted, progress: Progress) -> ExtractReport:
    """Write what `tuned` changed of `base` as the delta directory `out`.

    Raises `PeftcError`: E066 (not two checkpoints of one model, or nothing changed, or what changed cannot be kept),
    and as `peftc.driver.apply` does.
    """
    check_target(out, replace=True)
    refuse_trained(out)
    progress.step("compare the checkpoints")
    pairs = Pairs.open(base, tuned)
    if not pairs.changed and not pairs.fresh and not pairs.unreachable:
        fail("E066", f"{tuned} holds the tensors of {base}: nothing changed", help="give the tuned checkpoint last")
    lost = list(pairs.unreachable)
    if lost and not wanted.drop:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        message = f"{lost[0]}{more} changed, and no delta directory holds it: it is no parameter as stored"
        fail("E066", message, help="`--drop-others` leaves it out")
    found = _decomposed(pairs, wanted, progress)
    plan, whole = _planned(pairs, found, wanted)
    progress.step(f"write {out}")
    report = _report(pairs, out, found, plan, whole)
    _write(pairs, out, plan, found, report, progress)
    return report


def _decomposed(pairs: Pairs, wanted: Wanted, progress: Progress) -> dict[str, LowRank]:
    """The low-rank parts of the weights that have one smaller than they are."""
    linears = _linears(pairs)
    chosen = [name for name in pairs.changed if name in linears]
    progress.step("decompose the changes")
    found = {}
    for done, name in enumerate(chosen):
        low = _low_rank(pairs, name, wanted)
        if low is not None:
            found[name] = low
        progress.update(done + 1, len(chosen))
    return found


def _low_rank(pairs: Pairs, name: str, wanted: Wanted) -> LowRank | None:
    matrix = pairs.difference(name)
    most = (math.prod(matrix.shape) - 1) // sum(matrix.shape)
    if wanted.error is not None:
        return decompose_within(matrix, wanted.error, most) if most else None
    assert wanted.rank is not None
    return decompose(matrix, wanted.rank) if wanted.rank <= most else None


def _linears(pairs: Pairs) -> dict[str, tuple[Site, Linear]]:
    """Linear layers by the name of their weight, without those whose weight something else reads under another name."""
    program = analyse(pairs.skeleton, default_inputs(pairs.skeleton.model))
    tied = {*program.tied, *program.tied.values()}
    of = {site.path: site for site in program.sites if site.kind == "linear" and site.path}
    linears = [(site, linear) for site in of.values() for linear in site.linears.values()]
    return {linear.weight_name: (site, linear) for site, linear in linears if linear.weight_name not in tied}


def _planned(pairs: Pairs, found: dict[str, LowRank], wanted: Wanted) -> tuple[Plan, list[str]]:
    """The plan, and what it keeps whole; takes from `found` what would not fold into its weight again."""
    while True:
        program = analyse(pairs.skeleton, default_inputs(pairs.skeleton.model))
        sites = [site for site in program.sites if site.kind == "linear"]
        parameters = [name for name, _ in pairs.skeleton.model.named_parameters(remove_duplicate=False)]
        left = [name for name in (*pairs.changed, *pairs.fresh) if name not in found]
        keep = [name for name in left if name in parameters]
        if wanted.drop:
            keep = [name for name in keep if name in pairs.fresh]
        paths = {_site_of(sites, name).path: low.rank for name, low in found.items()}
        if not paths and not keep:
            fail("E066", "no weight of a linear layer changed", help="without --drop-others the rest is kept whole")
        text = rule_text(paths, keep, [site.path for site in sites], parameters)
        plan = rewrite(program, parse_rule(text, "extracted.yaml"), fresh=pairs.fresh)
        staying = {_weight(d.insertion.site) for d in analyse_folds(program) if not d.folds}
        if not staying:
            return plan, keep
        for name in staying:
            del found[name]


def _site_of(sites: Iterable[Site], weight: str) -> Site:
    return next(site for site in sites if weight in {linear.weight_name for linear in site.linears.values()})


def _weight(site: Site) -> str:
    (linear,) = site.linears.values()
    return linear.weight_name


def rule_text(ranks: Mapping[str, int], keep: Collection[str], sites: Collection[str], names: Collection[str]) -> str:
    """The rule: a row for each rank, at the linear layers of these paths; `keep` as they are. `sites` and `names` are
    all paths and parameters that a glob must tell apart."""
    rows: dict[str, Any] = {}
    for rank in sorted(set(ranks.values())):
        paths = globs([path for path, own in ranks.items() if own == rank], sites)
        for start in range(0, len(paths), _PATHS):
            name = f"r{rank}" + (f"_{start // _PATHS}" if len(paths) > _PATHS else "")
            rows[name] = {
                "at": "linear", "where": {"path": paths[start : start + _PATHS]}, "modify": "out",
                "insert": "parallel", "form": "low_rank", "with": {"r": rank},
            }  # fmt: skip
    lines = ["peftc: 1", "name: extracted", "doc: What tuning changed, of low rank, by `peftc extract`."]
    if rows:
        lines += ["deltas:", *(f"  {name}: {json.dumps(row)}" for name, row in rows.items())]
    if keep:
        lines.append(f"train: {json.dumps(globs(keep, names))}")
    return "\n".join(lines) + "\n"


def globs(wanted: Collection[str], names: Collection[str]) -> list[str]:
    """Globs that match all of `wanted` and nothing else of `names`: one for all layers where all are meant."""
    left, found = set(wanted), []
    for name in wanted:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", glob.escape(name))
        matched = {other for other in names if fnmatch.fnmatchcase(other, pattern)} if name in left else set()
        if name in left:
            found.append(pattern if matched <= set(wanted) else glob.escape(name))
            left -= matched if matched <= set(wanted) else {name}
    return found


def _report(pairs: Pairs, out: Path, found: Mapping[str, LowRank], plan: Plan, whole: list[str]) -> ExtractReport:
    entries = []
    for name, low in found.items():
        measured = pairs.difference(name).error(low.left.float().double(), low.right.float().double())
        error = measured / low.norm if low.norm else 0.0
        shape = pairs.difference(name).shape
        entries.append(Extracted(name, shape, low.rank, low.norm, error, low.exact, low.values))
    kept = {*found, *whole}
    dropped = [name for name in (*pairs.changed, *pairs.unreachable) if name not in kept]
    return ExtractReport(out, entries, list(plan.trained), list(dict.fromkeys(dropped)), plan.stored_count)


def _write(
    pairs: Pairs, out: Path, plan: Plan, found: Mapping[str, LowRank], report: ExtractReport, progress: Progress
) -> None:
    factors = {name: tensor for edit in plan.edits for name, tensor in _factors(edit, found)}
    specs = [TensorSpec(p.name, dtype_code(p.dtype), p.shape) for p in plan.parameters.values()]
    trained = {name: pairs.stored(name) for name in plan.trained}
    specs += [TensorSpec(name, info.dtype, info.shape) for name, (_, info) in trained.items()]

    def produce(name: str) -> torch.Tensor:
        if name in trained:
            header, info = trained[name]
            return read_tensor(header, info.name)
        return factors[name].to(plan.parameters[name].dtype).contiguous()

    def support(fresh: Path) -> None:
        pairs.tuned.copy_support_files(fresh)
        pairs.skeleton.model.config.save_pretrained(fresh)
        (fresh / FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")

    base = base_reference(pairs.base, pairs.head, pairs.num_labels, 0)
    with atomic_directory(out, replace=True) as fresh:
        write_files(
            fresh, out, plan=plan, base=base, entries=specs, produce=produce, support=support, saved=True,
            progress=progress.update,
        )  # fmt: skip


def _factors(edit: Edit, found: Mapping[str, LowRank]) -> list[tuple[str, torch.Tensor]]:
    """B and A by the names of their parameters."""
    (linear,) = edit.site.linears.values()
    low = found[linear.weight_name]
    b, a = (low.right.t(), low.left.t()) if linear.transposed else (low.left, low.right)
    named = edit.parameters["B"], edit.parameters["A"]
    return [(parameter.name, value) for parameter, value in zip(named, (b, a), strict=True) if parameter is not None]
