"""The words a rule may use for places and sizes: sites, their taps, and the dimensions every site knows."""

from __future__ import annotations

SITES: dict[str, tuple[str, ...]] = {
    "attention": ("x", "ctx", "q", "k", "v", "heads", "concat", "out"),
    "ffn": ("x", "gate", "up", "mid", "out", "residual"),
    "experts": ("gate_up", "gate", "up", "down", "gate_up_bias", "gate_bias", "up_bias", "down_bias"),
    "linear": ("x", "out", "weight", "bias"),
    "conv": ("x", "out", "weight", "bias"),
    "embedding": ("out", "weight"),
    "norm": ("x", "out", "weight", "bias"),
    "block": ("x", "out"),
    "model": (
        "ids", "mask", "types", "positions", "labels", "embeddings", "pooled", "logits", "outputs", "attentions",
        "cross_attentions",
    ),
}  # fmt: skip
"""Each kind of site with its taps."""

SERIES = ("pooled", "outputs", "attentions", "cross_attentions")
"""Taps that may be several values of one kind: `rewrite` sets them all."""

TAPS = frozenset(tap for taps in SITES.values() for tap in taps)

DIMS = (
    "d_in",
    "d_out",
    "d_model",
    "d_ff",
    "heads",
    "kv_heads",
    "head_dim",
    "key_dim",
    "experts",
    "layer",
    "layers",
    "has_bias",
)
"""Static names a site gives: d_in is the last axis of x, d_out that of h; for a weight they are its own."""

INSERTIONS = ("parallel", "sequential")
COMPOSITIONS = ("add", "gate", "prepend")

WEIGHTS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "out"),
    "ffn": ("gate", "up", "out"),
    "experts": ("gate_up", "gate", "up", "down"),
    "linear": ("x", "out", "weight", "bias"),
    "conv": ("x", "out", "weight", "bias"),
    "embedding": ("out", "weight"),
    "norm": ("x", "out", "weight", "bias"),
}
"""The taps of each kind of site behind which one stored weight stands, which `init` may read as `weight`."""
