"""Which stored tensor stands behind a tap: what an `init` reads as `weight`, and as `h` where h is a parameter.

    weight_behind(program, site, "q").name    # encoder.layer.0.attention.self.query.weight

Where q, k and v (or gate and up) come from one fused projection, the weight is the rows of it that make the tap.
Works on the graph as it is before any delta.
"""

from __future__ import annotations

from peftc.fold.evaluate import selection
from peftc.ir.initial import Stored
from peftc.ir.program import Program
from peftc.ir.sites import Linear, Site, Tap

_ROLES = {
    ("attention", "q"): ("q", "qkv"),
    ("attention", "k"): ("k", "kv", "qkv"),
    ("attention", "v"): ("v", "kv", "qkv"),
    ("attention", "out"): ("o",),
    ("ffn", "gate"): ("gate", "gate_up"),
    ("ffn", "up"): ("up", "gate_up"),
    ("ffn", "out"): ("down",),
}
"""The roles, in `Site.linears`, of the projection that makes a tap."""


def weight_behind(program: Program, site: Site, tap: str) -> Stored | None:
    """The weight that makes `tap`, or the site's own; None where no single stored weight does."""
    if site.kind == "experts":
        return parameter_at(program, site.taps[tap])
    if "weight" in site.taps:
        return parameter_at(program, site.taps["weight"])
    roles = _ROLES.get((site.kind, tap), ())
    linear = next((site.linears[role] for role in roles if role in site.linears), None)
    if linear is None:
        return None
    rows = _rows(program, linear, site.taps[tap])
    shape = (linear.d_out if rows is None else len(rows), linear.d_in)
    return Stored(linear.weight_name, shape, linear.transposed, rows)


def parameter_at(program: Program, tap: Tap) -> Stored | None:
    """The parameter that a tap `weight` or `bias` is."""
    name = program.parameter_name(tap.node)
    if name is None:
        return None
    shape = tuple(int(size) for size in tap.canonical_shape)  # pyright: ignore[reportArgumentType]
    return Stored(name, shape, tap.layout == "transposed")


def _rows(program: Program, linear: Linear, tap: Tap) -> tuple[int, ...] | None:
    if tap.node is linear.node:
        return None
    rows = tuple(selection(program, linear.node, tap.node, tap.layout).tolist())
    return None if rows == tuple(range(linear.d_out)) else rows
