"""Widening: a parallel bottleneck beside an FFN, with the FFN's own input and activation, is more hidden units.

    FFN(x) = act(x W_upᵀ) W_downᵀ      delta(x) = s act(x Aᵀ) Bᵀ
    FFN(x) + delta(x) = act(x [W_up; A]ᵀ) [W_down, s B]ᵀ

Both sides are read from the graph: where the delta stops being affine in x, where it is affine again, and what lies
between; that in-between must be the same pointwise function as the one between the FFN's up (and gate) projections
and its down projection, which is checked on a grid of points in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftc.fold.affine import Affine, Kind, Opaque, classify
from peftc.fold.evaluate import evaluate, selection
from peftc.fold.linears import Reach, short_name
from peftc.ir.program import Insertion, Program, is_call
from peftc.ir.sites import Linear, Site
from peftc.locate.walk import DROPOUT, NONLINEAR, POINTWISE, backward, reaches

aten = torch.ops.aten

_TOLERANCE = 1e-12
"""Of two spellings of one activation in float64, relative to the value beyond 1."""

_CASTS = (aten.to.dtype, aten.contiguous.default, *DROPOUT)


@dataclass(frozen=True, slots=True)
class Widening:
    """How a delta becomes hidden units: `inputs` are the delta's nodes that join the FFN's streams of that name."""

    inputs: dict[str, fx.Node]
    activated: fx.Node
    """The delta's hidden value, which joins the FFN's `mid`."""
    x: fx.Node
    input_offset: bool
    output_offset: bool
    rank: int
    inner: frozenset[fx.Node]
    """The FFN's values that become wider: from its up projections to what its down projection reads."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A delta cut in three: affine maps of x (`frontier`), a pointwise function of them, an affine map of that."""

    frontier: tuple[fx.Node, ...]
    activated: fx.Node
    input_offset: bool
    output_offset: bool


def find_widening(reach: Reach, insertion: Insertion) -> tuple[Widening | None, str]:
    """A widening for the insertion, or None and what hinders it ("" where it is no candidate at all)."""
    program, site, x = reach.program, insertion.site, reach.input_of(insertion)
    if site.kind != "ffn" or insertion.tap != "out" or x is None:
        return None, ""
    if "mid" not in site.taps:
        return None, f"{site.path} is a mixture of experts: {site.missing['mid']}"
    if "down" not in site.linears:
        return None, f"the projections of {site.path} are more than one linear layer each"
    if x is not program.current(site.taps["x"].node):
        return None, "its input is not that of the FFN"
    cut = _cut(reach, insertion, x)
    if cut is None:
        return None, "it has no single hidden value between two affine maps"
    streams = ["gate", "up"] if "gate" in site.taps else ["up"]
    if len(cut.frontier) != len(streams):
        gated = len(streams) == 2
        return None, "the FFN is gated and the delta is not" if gated else "the delta is gated, the FFN is not"
    inputs, difference = _match(program, site, streams, cut)
    if inputs is None:
        return None, f"its activation is not the FFN's own ({difference})"
    obstacle = _missing_bias(site.linears, cut) or reach.shared(site.linears.values()) or _interleaved(reach, site)
    if obstacle:
        return None, obstacle
    rank = int(cut.activated.meta["val"].shape[-1])
    inner = _inner(reach, site)
    return Widening(inputs, cut.activated, x, cut.input_offset, cut.output_offset, rank, inner), ""


def _cut(reach: Reach, insertion: Insertion, x: fx.Node) -> _Cut | None:
    """The cut at the first value after which everything is affine in it and h stands alone."""
    kinds = classify(insertion.nodes, {insertion.before: "h", x: "x"}, reach.parameters)
    for candidate in insertion.nodes:
        if not isinstance(kinds[candidate], Opaque):
            continue
        streams = {insertion.before: "h", candidate: "a"}
        result = classify(insertion.nodes, streams, reach.parameters)[insertion.after]
        if isinstance(result, Affine) and "h" in result.unit and result.streams == {"h", "a"}:
            frontier = _frontier(candidate, kinds)
            if len(frontier) > 1:  # an activation that is spelled out reads z and 0.5 * z, say
                frontier = _plain(frontier)
            offset = any(isinstance(kind := kinds[node], Affine) and kind.offset for node in frontier)
            return _Cut(frontier, candidate, offset, result.offset) if frontier else None
    return None


def _frontier(activated: fx.Node, kinds: Mapping[fx.Node, Kind]) -> tuple[fx.Node, ...]:
    """The affine nodes that a pointwise computation of `activated` starts from, in graph order; () if it is none."""
    frontier: list[fx.Node] = []
    queue, seen = [activated], set[fx.Node]()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = kinds.get(node)
        if isinstance(kind, Affine) and kind.streams == {"x"}:
            frontier.append(node)
        elif isinstance(kind, Opaque) and is_call(node, *NONLINEAR, *POINTWISE, *_CASTS):
            queue.extend(node.all_input_nodes)
        else:
            return ()
    return tuple(sorted(frontier))


def _plain(frontier: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The frontier with arithmetic on numbers counted to the activation."""
    found = set[fx.Node]()
    for node in frontier:
        while is_call(node, *POINTWISE, *_CASTS) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        found.add(node)
    return tuple(sorted(found))


def _match(program: Program, site: Site, streams: list[str], cut: _Cut) -> tuple[dict[str, fx.Node] | None, str]:
    """Pair the delta's frontier with the FFN's streams so that both activations agree on a grid of points."""
    points = _points(len(streams))
    feeds = {program.current(site.taps[name].node): points[i] for i, name in enumerate(streams)}
    try:
        own = evaluate(program, site.taps["mid"].node, feeds, dtype=torch.float64)
    except (ValueError, RuntimeError):
        return None, "the FFN's own is not pointwise"
    if own.shape != points[0].shape:
        return None, "the FFN's own is not pointwise"
    best = float("inf")
    for order in itertools.permutations(cut.frontier):
        feeds = dict(zip(order, points, strict=True))
        value = evaluate(program, cut.activated, feeds, dtype=torch.float64)
        difference = float(((value - own).abs() / own.abs().clamp_min(1)).max())
        if difference <= _TOLERANCE:
            return dict(zip(streams, order, strict=True)), ""
        best = min(best, difference)
    return None, f"they differ by up to {best:.1e}"


def _points(count: int) -> list[torch.Tensor]:
    """Points densely around 0 and thinly far out; each further stream in another order."""
    near = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    far = torch.logspace(1, 2.3, 100, dtype=torch.float64)
    points = torch.cat([near, far, -far])
    generator = torch.Generator().manual_seed(0)
    return [points, *(points[torch.randperm(len(points), generator=generator)] for _ in range(count - 1))]


def _missing_bias(linears: Mapping[str, Linear], cut: _Cut) -> str:
    needed = [linear for role, linear in linears.items() if role != "down"] if cut.input_offset else []
    needed += [linears["down"]] if cut.output_offset else []
    lacking = next((linear for linear in needed if linear.bias_name is None), None)
    return f"it has a bias, and `{short_name(lacking)}` has none" if lacking else ""


def _interleaved(reach: Reach, site: Site) -> str:
    """A fused projection must hold one stream after the other, so that each can be made longer at its end."""
    fused = site.linears.get("gate_up")
    if fused is None:
        return ""
    width = fused.d_out // 2
    taps = [site.taps[name] for name in ("gate", "up")]
    starts = []
    for tap in taps:
        rows = selection(reach.program, fused.node, tap.node, tap.layout)
        starts.append(int(rows[0]))
        if not torch.equal(rows, torch.arange(starts[-1], starts[-1] + width)):
            return f"{fused.weight_name} interleaves gate and up"
    return "" if sorted(starts) == [0, width] else f"{fused.weight_name} holds more than gate and up"


def _inner(reach: Reach, site: Site) -> frozenset[fx.Node]:
    read = site.linears["down"].node.args[0]
    assert isinstance(read, fx.Node)
    within = set(backward([read], lambda node: node in reach.linears))
    ups = [linear.node for role, linear in site.linears.items() if role != "down"]
    return frozenset().union(*(reaches(up, within) for up in ups))
