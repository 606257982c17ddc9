"""Reports: what a command found or did, as JSON for programs and as text for people."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.lang.rule import in_words
from peftc.planning.gaps import gaps
from peftc.planning.layered import describe_layers, per_layer
from peftc.planning.overlaps import overlaps
from peftc.planning.reach import unreached
from peftc.planning.sharing import shared

if TYPE_CHECKING:
    from rich.console import Console

    from peftc.backends.hf import Checkpoint, CheckpointPlan
    from peftc.backends.onnx import OnnxFiles
    from peftc.fold.decide import Decision
    from peftc.ir.program import Program
    from peftc.ir.sites import Site
    from peftc.merging.certify import Comparison
    from peftc.planning.counts import Counts
    from peftc.planning.plan import Plan


@dataclass(slots=True)
class SitesReport:
    """The site table of a model."""

    path: Path
    program: Program

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.path),
            "sites": [_site_json(site) for site in self.program.sites],
            "unreached": [fact.to_json() for fact in unreached(self.program)],
        }

    def render(self, console: Console) -> None:
        from rich.tree import Tree

        tree = Tree(f"[bold]{self.path}[/bold]")
        branches: dict[str, Tree] = {}
        for group in _collapsed(self.program.sites):
            site = group[0]
            where = "outside blocks" if site.layer < 0 else f"{site.stack} {_layers(group)}"
            if where not in branches:
                branches[where] = tree.add(f"[bold]{where}[/bold]")
            branches[where].add(_describe(group))
        console.print(tree)
        for fact in unreached(self.program):
            console.print(f"note: {fact.describe()}")


def _site_json(site: Site) -> dict[str, Any]:
    return {
        "kind": site.kind,
        "path": site.path,
        "stack": site.stack,
        "layer": site.layer,
        "variant": site.variant,
        "causal": site.causal,
        "role": site.role,
        "dims": site.dims,
        "taps": {name: tap.width for name, tap in site.taps.items()},
        "missing": site.missing,
    }


def _collapsed(sites: tuple[Site, ...]) -> list[list[Site]]:
    """Sites that differ in nothing but their layer, together."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        inner = site.path[len(site.block) :] if site.block else site.path
        dims = tuple((k, v) for k, v in site.dims.items() if k != "layer")
        key = (site.kind, site.variant, site.stack, site.layer < 0, inner, dims, tuple(site.taps), site.role)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _layers(group: list[Site]) -> str:
    layers = sorted({site.layer for site in group})
    if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _describe(group: list[Site]) -> str:
    site = group[0]
    name = f"{site.variant} {site.kind}".strip() + (f" ({site.role})" if site.role not in ("", "other") else "")
    path = site.path.replace(site.block, "*", 1) if site.block and len(group) > 1 else site.path
    hidden = {"layer", "layers", "has_bias"}
    dims = " ".join(f"{key}={value}" for key, value in site.dims.items() if key not in hidden)
    taps = " ".join(site.taps)
    return f"[cyan]{name}[/cyan] {path or '(root)'}  [dim]{dims}[/dim]  taps: {taps}"


@dataclass(slots=True)
class PlanReport:
    """What a rule would do to a model, and what would fold."""

    path: Path
    plan: Plan
    counts: Counts
    decisions: list[Decision]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.path),
            "rule": self.plan.rule.name,
            "hyper": self.plan.rule.values,
            "per_layer": per_layer(self.plan),
            "gaps": [gap.to_json() for gap in gaps(self.plan)],
            "shared": [fact.to_json() for fact in shared(self.plan)],
            "unreached": [fact.to_json() for fact in self.plan.unreached],
            "overlaps": [overlap.to_json() for overlap in overlaps(self.plan)],
            **counts_json(self.plan, self.counts),
            "parameters": {p.name: list(p.shape) for p in self.plan.parameters.values()},
            "trained_base": list(self.plan.trained),
            "lr": self.plan.rates,
            "folds": folds_json(self.decisions),
        }

    def render(self, console: Console) -> None:
        hyper = " ".join(f"{name}={in_words(value)}" for name, value in self.plan.rule.values.items())
        console.print(f"[bold]{self.plan.rule.name}[/bold] on {self.path}  [dim]{hyper}[/dim]")
        for name, values in per_layer(self.plan).items():
            console.print(f"{name} = {describe_layers(values)}")
        render_deltas(console, self.plan, self.counts)
        for fact in (*gaps(self.plan), *shared(self.plan), *self.plan.unreached):
            console.print(f"note: {fact.describe()}")
        for overlap in overlaps(self.plan):
            console.print(f"overlap: {overlap.describe()}")
        render_folds(console, self.decisions)


@dataclass(slots=True)
class ApplyReport:
    """What `apply` wrote."""

    out: Path
    plan: Plan
    counts: Counts

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "rule": self.plan.rule.name,
            **counts_json(self.plan, self.counts),
            "gaps": [gap.to_json() for gap in gaps(self.plan)],
            "shared": [fact.to_json() for fact in shared(self.plan)],
            "unreached": [fact.to_json() for fact in self.plan.unreached],
        }

    def render(self, console: Console) -> None:
        render_deltas(console, self.plan, self.counts)
        for fact in (*gaps(self.plan), *shared(self.plan), *self.plan.unreached):
            console.print(f"note: {fact.describe()}")
        console.print(f"wrote [bold]{self.out}[/bold]; train it, then: peftc merge {self.out} --export onnx")


def counts_json(plan: Plan, counts: Counts) -> dict[str, Any]:
    return {
        **counts.to_json(),
        "percent": round(plan.percent, 4),
        **({"budget": asdict(plan.budget)} if plan.budget is not None else {}),
        "sites": {delta.name: len(plan.sites_of(delta.name)) for delta in plan.rule.deltas},
    }


def render_deltas(console: Console, plan: Plan, counts: Counts) -> None:
    from rich.table import Table

    table = Table("delta", "form", "at", "sites", "parameters", box=None, pad_edge=False)
    for delta in plan.rule.deltas:
        own = {p.name: p.numel for e in plan.edits if e.delta is delta for p in e.parameters.values() if p is not None}
        sites = plan.sites_of(delta.name)
        modified = [tap for tap in delta.modify if not sites or any(tap in site.taps for site in sites)]
        place = ".".join(part for part in (", ".join(delta.at), ", ".join(modified)) if part)
        table.add_row(
            delta.name,
            "(carried)" if delta.value else "(rewrite)" if delta.sets else delta.form.name or "(inline)",
            place,
            str(len(plan.sites_of(delta.name))),
            f"{sum(own.values()):,}",
        )
    console.print(table)
    if plan.trained:
        shown = ", ".join(plan.trained[:3]) + (f" and {len(plan.trained) - 3} more" if len(plan.trained) > 3 else "")
        console.print(f"trained as they are: {shown}")
    rates: dict[tuple[str, float], list[str]] = {}
    for name, rate in plan.rates.items():
        rates.setdefault((name.rpartition(".")[2], rate), []).append(name)
    for (name, rate), names in rates.items():
        console.print(f"learning rate of {name} ({len(names)} tensors): {rate:g} times the base's")
    console.print(f"trains {plan.trained_count:,} of {plan.base_count:,} parameters ({plan.percent:.2f} %)")
    console.print(counts.describe())
    if not plan.trainable:
        console.print("note: nothing trains; `peftc explain W013`")
    if plan.budget is not None:
        console.print(plan.budget.describe())


def fold_groups(decisions: list[Decision]) -> dict[tuple[str, str, str], list[Decision]]:
    """Decisions that say the same of the same delta, together; nodes of different layers have different numbers."""
    groups: dict[tuple[str, str, str], list[Decision]] = {}
    for decision in decisions:
        key = (decision.insertion.delta, decision.result, re.sub(r"_\d+\b", "", decision.reason))
        groups.setdefault(key, []).append(decision)
    return {(delta, result, group[0].reason): group for (delta, result, _), group in groups.items()}


def folds_json(decisions: list[Decision]) -> list[dict[str, Any]]:
    return [
        {"delta": delta, "result": result, "sites": len(group), "reason": reason, "node": group[0].node}
        for (delta, result, reason), group in fold_groups(decisions).items()
    ]


def render_folds(console: Console, decisions: list[Decision]) -> None:
    from rich.markup import escape

    for (delta, result, reason), group in fold_groups(decisions).items():
        why = f": {escape(reason)}" if reason else ""
        console.print(f"fold [bold]{delta}[/bold] at {len(group)} sites -> [cyan]{result}[/cyan]{why}")


@dataclass(slots=True)
class MergeReport:
    """What `merge` wrote, what folded, and how near the result is to the unfolded model."""

    out: Path
    decisions: list[Decision]
    plan: Plan
    checkpoint: Checkpoint | None = None
    onnx: OnnxFiles | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    exported: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every file of an export."""
    notes: list[str] = field(default_factory=list)
    """What the certificate does not hold, and why."""
    undo: int | None = None
    """Bytes of what restores the base."""

    @property
    def results(self) -> Counter[str]:
        """How many insertions ended as merged, widened, constant, kept."""
        return Counter(decision.result for decision in self.decisions)

    def to_json(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "folds": folds_json(self.decisions),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }
        if self.checkpoint is not None:
            c = self.checkpoint
            report["checkpoint"] = {"changed": c.changed, "copied": c.copied, "added": c.added}
            report["tensors"] = [change.to_json() for change in c.changes]
            report["untouched"] = c.copied
        if self.undo is not None:
            report["undo"] = self.undo
        if self.notes:
            report["notes"] = self.notes
        if self.onnx is not None:
            o = self.onnx
            report["onnx"] = {
                "inputs": list(o.inputs), "outputs": list(o.outputs), "opset": o.opset, "nodes": o.nodes,
                "graphs": list(o.graphs), "cached": o.cached, "uncached": o.cache,
            }  # fmt: skip
        return report

    def render(self, console: Console) -> None:
        render_folds(console, self.decisions)
        if self.checkpoint is not None:
            c = self.checkpoint
            console.print(f"checkpoint: {c.changed} tensors changed, {c.copied} copied, {c.added} added")
            console.print(c.describe_rounding())
        if self.undo is not None:
            console.print(f"undo.zip: {self.undo / 1e6:,.1f} MB; `peftc unmerge {self.out}` restores the base's bytes")
        if self.onnx is not None:
            o = self.onnx
            console.print(f"{', '.join(o.graphs)}: {o.describe()}; opset {o.opset}")
            if o.cache:
                console.print(f"without a cache: {o.cache}")
        for archive in (name for name in self.files if name.endswith(".pt2")):
            console.print(f"{archive}: inputs by name, a dictionary of outputs, batch and sequence of any size")
        for what in dict.fromkeys((c.what, c.dtype) for c in self.comparisons):
            worst = max((c for c in self.comparisons if (c.what, c.dtype) == what), key=lambda c: c.absolute)
            console.print(f"{worst.what} ({worst.dtype}): largest difference {worst.absolute:.2e}, on {worst.inputs}")
        for note in self.notes:
            console.print(f"note: {note}")
        agreeing = [c.top1 for c in self.comparisons if c.top1 is not None]
        if agreeing:
            console.print(f"most likely token: the same at {100 * min(agreeing):.4g} % of places at least")
        console.print(f"wrote [bold]{self.out}[/bold] with certificate.json")


@dataclass(slots=True)
class ScheduleReport:
    """What a merge would write, shard by shard."""

    directory: Path
    decisions: list[Decision]
    checkpoint: CheckpointPlan

    def to_json(self) -> dict[str, Any]:
        shards = [
            {
                "file": shard.file,
                "bytes": shard.nbytes,
                "copied": [piece.spec.name for piece in shard.pieces if piece.source is not None],
                "folded": [piece.spec.name for piece in shard.pieces if piece.source is None],
            }
            for shard in self.checkpoint.shards
        ]
        return {
            "delta": str(self.directory),
            "bytes": self.checkpoint.nbytes,
            "working_set": self.checkpoint.working_set,
            "shards": shards,
            "folds": folds_json(self.decisions),
        }

    def render(self, console: Console) -> None:
        from rich.table import Table

        render_folds(console, self.decisions)
        table = Table("shard", "MB", "copied", "folded", box=None, pad_edge=False)
        for shard in self.checkpoint.shards:
            folded = sum(piece.source is None for piece in shard.pieces)
            table.add_row(shard.file, f"{shard.nbytes / 1e6:,.1f}", str(len(shard.pieces) - folded), str(folded))
        console.print(table)
        size, at_once = (f"{size / 1e6:,.1f} MB" for size in (self.checkpoint.nbytes, self.checkpoint.working_set))
        console.print(f"would write {size}; the largest fold works on {at_once} at once")
