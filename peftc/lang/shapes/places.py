"""What is known of x, h and the taps at a kind of site, before there is a model.

Sizes are named by the site's dimensions: `d_in` is the last axis of x, `d_out` that of h. Where the place says more,
an alias does: the output of an FFN joins the stream its input comes from, so both are `d_model` there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from peftc.lang.rule import Delta
from peftc.lang.shapes.polynomial import Polynomial, symbol
from peftc.lang.shapes.terms import UNKNOWN, Shape
from peftc.lang.sites import SITES

_B, _S, _T = (symbol(name) for name in ("B", "S", "T"))
_IN, _OUT, _MODEL, _INNER = (symbol(name) for name in ("d_in", "d_out", "d_model", "d_ff"))
_HEADS, _KV, _WIDTH, _KEY = (symbol(name) for name in ("heads", "kv_heads", "head_dim", "key_dim"))
_EXPERTS = symbol("experts")

_LAST: dict[tuple[str, str], Polynomial] = {
    ("attention", "x"): _MODEL,
    ("attention", "q"): _HEADS * _KEY,
    ("attention", "v"): _KV * _WIDTH,
    ("attention", "heads"): _WIDTH,
    ("attention", "concat"): _HEADS * _WIDTH,
    ("attention", "out"): _MODEL,
    ("ffn", "x"): _MODEL,
    ("ffn", "gate"): _INNER,
    ("ffn", "up"): _INNER,
    ("ffn", "mid"): _INNER,
    ("ffn", "out"): _MODEL,
    ("ffn", "residual"): _MODEL,
    ("norm", "x"): _OUT,
    ("norm", "out"): _OUT,
    ("block", "x"): _MODEL,
    ("block", "out"): _MODEL,
    ("model", "embeddings"): _MODEL,
}
"""The last axis of a tap, where the kind of site tells it."""

_LEAD: dict[tuple[str, str], tuple[Polynomial, ...]] = {
    **{("attention", tap): (_B, _S) for tap in ("x", "q", "concat", "out")},
    **{("attention", tap): (_B, _T) for tap in ("ctx", "k", "v")},
    ("attention", "heads"): (_B, _HEADS, _S),
    ("block", "x"): (_B, _S),
    ("block", "out"): (_B, _S),
    ("model", "embeddings"): (_B, _S),
}
"""The axes in front, where their number is known; an FFN or a linear may be fed rows without a batch axis."""

_OUTER: dict[str, Polynomial] = {"gate_up": _INNER + _INNER, "gate": _INNER, "up": _INNER, "down": _MODEL}
_STACKED: dict[str, tuple[Polynomial, ...]] = {
    **{f"{name}_bias": (_EXPERTS, size) for name, size in _OUTER.items()},
    **{name: (_EXPERTS, size, _INNER if name == "down" else _MODEL) for name, size in _OUTER.items()},
}
"""The taps of experts, all of them parameters."""


@dataclass(frozen=True, slots=True)
class Place:
    """One kind of site and tap: the shapes of h, x and the other taps, and what sizes are by another name."""

    site: str
    tap: str
    h: Shape
    x: Shape | None
    taps: Mapping[str, Shape]
    aliases: Mapping[str, Polynomial]


def places(delta: Delta) -> Iterator[Place]:
    """Every kind of site and tap that the row names."""
    for site in delta.at:
        for tap in delta.modify:
            if tap in SITES.get(site, ()):
                yield _place(delta, site, tap)


def _place(delta: Delta, site: str, tap: str) -> Place:
    h = _shape(site, tap, _OUT)
    elsewhere = "x" in delta.sources
    source = None if elsewhere else _source(delta.insert, site, tap)
    x = h if source == tap else None if source is None else _shape(site, source, _IN)
    taps = {name: _shape(site, name, _LAST.get((site, name))) for name in SITES[site]}
    if source is not None and x is not None:
        taps[source] = x
    taps[tap] = h
    taps |= dict.fromkeys(delta.sources, UNKNOWN)
    aliases = _aliases(site, tap, source)
    if elsewhere:
        x = Shape((_IN,), open=True)
        aliases.pop("d_in", None)
    return Place(site, tap, h, x, taps, aliases)


def _shape(site: str, tap: str, last: Polynomial | None) -> Shape:
    """The shape of a tap whose last axis is `last`."""
    if site == "experts":
        return Shape(_STACKED[tap])
    if site == "conv" and tap != "bias":
        return UNKNOWN
    if tap == "bias" or (site, tap) == ("norm", "weight"):
        return Shape((_OUT,))
    if tap == "weight":
        return Shape((_OUT, _IN))
    lead = _LEAD.get((site, tap))
    return Shape((*(lead or ()), last), open=lead is None)


def _source(insert: str, site: str, tap: str) -> str | None:
    """The tap that x is, by the rule of `peftc.planning.plan.input_tap`."""
    if insert == "sequential":
        return tap
    name = ("ctx" if tap in ("k", "v") and site == "attention" else "x") if insert == "parallel" else insert
    return name if name in SITES[site] else None


def _aliases(site: str, tap: str, source: str | None) -> dict[str, Polynomial]:
    """What `d_in` and `d_out` are by another name."""
    found: dict[str, Polynomial] = {}
    if site == "experts":
        return {"d_out": _STACKED[tap][1], "d_in": _STACKED[tap][-1]}
    h = _LAST.get((site, tap))
    if h is not None and h != _OUT:
        found["d_out"] = h
    one_axis = tap == "bias" or (site, tap) == ("norm", "weight")
    if (source == tap and (tap != "weight" or one_axis)) or (source is None and tap != "weight"):
        found["d_in"] = found.get("d_out", _OUT)
    elif source is not None and tap != "weight" and (site, source) in _LAST:
        found["d_in"] = _LAST[site, source]
    return found
