"""The op table of rule expressions: each name, its arguments, one line of doc.

This module holds no torch; `peftc.lang.lower` turns each op into a torch.fx node. An op's arguments are tensors
unless they are listed in `static`, which take numbers, words or lists known when the graph is written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Op:
    """One named op: at least `arity[0]` and at most `arity[1]` positional arguments, `keywords` by name."""

    name: str
    arity: tuple[int, int]
    doc: str
    keywords: tuple[str, ...] = ()


_TABLE = (
    Op("linear", (2, 3), "x Wᵀ + b on the last axis; W is [out, in], b is [out] or absent"),
    Op("matmul", (2, 2), "the same as `a @ b`"),
    Op("einsum", (2, 5), "einsum('bsd,rd->bsr', x, W)"),
    Op("transpose", (3, 3), "swap two axes"),
    Op("reshape", (2, 2), "reshape(x, [a, b]); -1 once for the rest"),
    Op("unsqueeze", (2, 2), "a new axis of size 1"),
    Op("squeeze", (2, 2), "drop an axis of size 1"),
    Op("concat", (2, 8), "join along an axis: concat(a, b, dim=-1)", ("dim",)),
    Op("stack", (2, 8), "stack along a new axis: stack(a, b, dim=0)", ("dim",)),
    Op("split_heads", (2, 2), "[B, S, heads * head_dim] to [B, heads, S, head_dim]; the second argument is heads"),
    Op("merge_heads", (1, 1), "[B, heads, S, head_dim] to [B, S, heads * head_dim]"),
    Op("relu", (1, 1), "max(x, 0)"),
    Op("gelu", (1, 1), "x Φ(x), exact"),
    Op("gelu_tanh", (1, 1), "gelu by its tanh approximation (GPT-2's gelu_new)"),
    Op("silu", (1, 1), "x sigmoid(x)"),
    Op("tanh", (1, 1), "hyperbolic tangent"),
    Op("sigmoid", (1, 1), "1 / (1 + exp(-x))"),
    Op("softplus", (1, 1), "log(1 + exp(x))"),
    Op("identity", (1, 1), "x itself: the linear case of a form's activation"),
    Op("softmax", (1, 1), "softmax over the last axis, or dim", ("dim",)),
    Op("logsumexp", (1, 1), "log of the sum of exponentials over the last axis, kept; or dim", ("dim",)),
    Op("exp", (1, 1), "exponential"),
    Op("log", (1, 1), "natural logarithm"),
    Op("sqrt", (1, 1), "square root"),
    Op("rsqrt", (1, 1), "1 / square root"),
    Op("abs", (1, 1), "absolute value"),
    Op("sign", (1, 1), "-1, 0 or 1"),
    Op("clamp", (3, 3), "clamp(x, low, high)"),
    Op("mean", (1, 1), "mean over dim (the last axis), kept", ("dim",)),
    Op("sum", (1, 1), "sum over dim (the last axis), kept", ("dim",)),
    Op("norm", (1, 1), "Euclidean norm over dim (the last axis), kept", ("dim",)),
    Op("layer_norm", (3, 3), "layer_norm(x, weight, bias) over the last axis", ("eps",)),
    Op("rms_norm", (2, 2), "rms_norm(x, weight) over the last axis", ("eps",)),
    Op("dropout", (2, 2), "dropout(x, p) while training"),
)

OPS: dict[str, Op] = {op.name: op for op in _TABLE}

INITS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("zeros", (0, 0), "all zero"),
        Op("ones", (0, 0), "all one"),
        Op("constant", (1, 1), "all equal to the value"),
        Op("normal", (1, 1), "normal with mean 0 and the given standard deviation"),
        Op("uniform", (1, 1), "uniform on [-a, a]"),
        Op("kaiming_uniform", (0, 0), "uniform with bound 1/sqrt(fan_in), torch's default for a linear layer"),
        Op("kaiming_normal", (0, 0), "normal with std sqrt(2/fan_in)"),
        Op("xavier_uniform", (0, 0), "uniform with bound sqrt(6/(fan_in + fan_out))"),
        Op("eye", (0, 0), "the identity matrix"),
    )
}
"""`init:` values; fan_in is the last axis of the shape, fan_out the one before."""
