"""Widening: a parallel bottleneck beside an FFN, with the FFN's own input and activation, is more hidden units.

    FFN(x) = act(x W_upᵀ) W_downᵀ      delta(x) = s act(x Aᵀ) Bᵀ
    FFN(x) + delta(x) = act(x [W_up; A]ᵀ) [W_down, s B]ᵀ

Both sides are read from the graph: where the delta stops being affine in x, where it is affine again, and what lies
between; that in-between must be the same pointwise function as the one between the FFN's up (and gate) projections
and its down projection, which is checked on a grid of points in float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import fx

from peftc.fold.affine import Affine, Opaque, classify
from peftc.fold.evaluate import evaluate
from peftc.ir.program import Insertion, Program, is_call
from peftc.ir.sites import Linear
from peftc.locate.walk import DROPOUT, NONLINEAR, POINTWISE

aten = torch.ops.aten

_TOLERANCE = 1e-12
_SAME = (aten.to.dtype, aten.contiguous.default, *DROPOUT)


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


def find_widening(program: Program, insertion: Insertion, constants: set[fx.Node]) -> tuple[Widening | None, str]:
    """A widening for the insertion, or None and what hinders it ("" where it is no candidate at all)."""
    site = insertion.site
    if site.kind != "ffn" or insertion.tap != "out" or insertion.x is None or insertion.x is insertion.before:
        return None, ""
    x = insertion.x
    while is_call(x, aten.to.dtype):
        x = x.args[0]  # type: ignore[assignment]
    own = program.current(site.taps["x"].node)
    if x is not own:
        return None, "its input is not that of the FFN"
    cut = _cut(insertion, x, constants)
    if cut is None:
        return None, "it has no single hidden value between two affine maps"
    frontier, activated, kinds, output_offset = cut
    streams = ["gate", "up"] if "gate" in site.taps else ["up"]
    if len(frontier) != len(streams):
        return None, "the FFN is gated and the delta is not" if len(streams) == 2 else "the delta is gated, the FFN is not"
    named, difference = _match(program, insertion, streams, frontier, activated)
    if named is None:
        return None, f"its activation is not the FFN's own ({difference})"
    input_offset = any(kind.offset for node in frontier if isinstance(kind := kinds[node], Affine))
    obstacle = _missing_bias(site.linears, input_offset, output_offset)
    if obstacle:
        return None, obstacle
    rank = int(activated.meta["val"].shape[-1])
    return Widening(named, activated, x, input_offset, output_offset, rank), ""


def _cut(
    insertion: Insertion, x: fx.Node, constants: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node, dict[fx.Node, Affine | Opaque], bool] | None:
    """The affine nodes the activation reads, the activated value, the kinds, and whether an offset follows."""
    kinds = classify(insertion.nodes, {insertion.before: "h", x: "x"}, constants)
    opaque = [node for node in insertion.nodes if isinstance(kinds.get(node), Opaque)]
    for candidate in opaque:
        streams = {insertion.before: "h", candidate: "a"}
        result = classify(insertion.nodes, streams, constants)[insertion.after]
        if isinstance(result, Affine) and "h" in result.unit and result.streams == {"h", "a"}:
            region = _region(candidate, kinds)
            if region is None:
                return None
            return region, candidate, kinds, result.offset  # type: ignore[return-value]
    return None


def _region(activated: fx.Node, kinds: dict[fx.Node, object]) -> list[fx.Node] | None:
    """The affine nodes that a pointwise computation of `activated` starts from, in graph order."""
    frontier: list[fx.Node] = []
    queue, seen = [activated], set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(kinds.get(node), Affine):
            frontier.append(node)
        elif is_call(node, *NONLINEAR, *POINTWISE, *_SAME):
            queue.extend(node.all_input_nodes)
        else:
            return None
    return sorted(frontier)


def _match(
    program: Program, insertion: Insertion, streams: list[str], frontier: list[fx.Node], activated: fx.Node
) -> tuple[dict[str, fx.Node] | None, str]:
    """Pair the delta's frontier with the FFN's streams so that both activations agree on a grid of points."""
    site = insertion.site
    points = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    rows = {name: points if i == 0 else points.flip(0) * 0.7 + 0.3 for i, name in enumerate(streams)}
    try:
        own = evaluate(
            program, site.taps["mid"].node, {site.taps[n].node: v for n, v in rows.items()}, dtype=torch.float64
        )
    except (ValueError, RuntimeError):
        return None, "the FFN's own is not pointwise"
    if own.shape != points.shape:
        return None, "the FFN's own is not pointwise"
    best = float("inf")
    for order in itertools.permutations(frontier):
        named = dict(zip(streams, order, strict=True))
        value = evaluate(program, activated, {named[n]: v for n, v in rows.items()}, dtype=torch.float64)
        difference = float((value - own).abs().max())
        if difference <= _TOLERANCE:
            return named, ""
        best = min(best, difference)
    return None, f"they differ by up to {best:.1e}"


def _missing_bias(linears: dict[str, Linear], input_offset: bool, output_offset: bool) -> str:
    ups = [linear for role, linear in linears.items() if role != "down"]
    if input_offset and any(linear.bias_name is None for linear in ups):
        return f"it has a bias, and {ups[0].weight_name.rpartition('.')[0]} has none"
    if output_offset and linears["down"].bias_name is None:
        return f"it has a bias, and {linears['down'].weight_name.rpartition('.')[0]} has none"
    return ""
