"""The op table of patterns: each name, how many operands it takes, and the aten overloads it stands for.

The names are those of `peftc.lang.ops` where both tables have the op. An overload is given with the positions of its
operands, so that `embedding(ids, W)` names the data first although aten takes the table first. This module holds no
torch; `peftc.patterns.graph` resolves the overloads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class PatternOp:
    """One op of patterns, with at least `arity[0]` and at most `arity[1]` operands.

    An operand beyond those a pattern writes must be absent in the graph, unless `open`.
    """

    name: str
    arity: tuple[int, int]
    doc: str
    targets: Mapping[str, tuple[int, ...]]
    """aten overloads, each with the positions of the operands among its arguments."""
    group: str = ""
    """What it is alike to, for telling the nearest miss: activation, norm, product, sum."""
    commutative: bool = False
    heads: bool = False
    """Whether it works on axes other than the last, so that any view or transpose may stand beside it."""
    open: bool = False
    variadic: bool = False
    """Whether its operands are one list in aten."""


def _same(*names: str, count: int = 1) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys((name if "." in name else f"{name}.default" for name in names), tuple(range(count)))


def _activation(name: str, doc: str, *targets: str) -> PatternOp:
    return PatternOp(name, (1, 1), doc, _same(*(targets or (name,))), "activation")


def _pointwise(name: str, doc: str) -> PatternOp:
    return PatternOp(name, (1, 1), doc, _same(name))


_ACTIVATIONS = (
    _activation("relu", "max(x, 0)", "relu", "relu_"),
    _activation("gelu", "x Φ(x), exact", "gelu", "gelu_"),
    _activation("gelu_tanh", "gelu by its tanh approximation, as one op", "gelu", "gelu_"),
    _activation("silu", "x sigmoid(x)", "silu", "silu_"),
    _activation("tanh", "hyperbolic tangent", "tanh", "tanh_"),
    _activation("sigmoid", "1 / (1 + exp(-x))", "sigmoid", "sigmoid_"),
    _activation("softplus", "log(1 + exp(x))"),
    _activation("leaky_relu", "x, and a x below 0", "leaky_relu", "leaky_relu_"),
    _activation("elu", "x, and exp(x) - 1 below 0", "elu", "elu_"),
    _activation("selu", "a scaled elu"),
    _activation("celu", "a smooth elu"),
    _activation("relu6", "relu up to 6"),
    _activation("mish", "x tanh(softplus(x))", "mish", "mish_"),
    _activation("hardswish", "x relu6(x + 3) / 6", "hardswish", "hardswish_"),
    _activation("hardsigmoid", "relu6(x + 3) / 6"),
    _activation("hardtanh", "x between -1 and 1", "hardtanh", "hardtanh_"),
    _activation("log_sigmoid", "log(sigmoid(x))"),
    _activation("erf", "the error function"),
)

_TABLE = (
    PatternOp("linear", (2, 3), "x Wᵀ + b: linear(x, W) has no bias, linear(x, W, b?) may have one",
              _same("linear", count=3), "product"),
    PatternOp("matmul", (2, 2), "the same as `a @ b`", _same("matmul", "bmm", "mm", count=2), "product", heads=True),
    PatternOp("conv", (2, 3), "a convolution of one to three axes: conv(x, W, b?)",
              _same("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", count=3), "product", heads=True),
    PatternOp("embedding", (2, 2), "rows of a table: embedding(ids, W)", {"embedding.default": (1, 0)}, "product"),
    PatternOp("sdpa", (3, 4), "an attention as one op: sdpa(q, k, v), with any mask, or sdpa(q, k, v, mask)",
              _same("scaled_dot_product_attention", count=4), heads=True, open=True),
    PatternOp("softmax", (1, 1), "softmax over the last axis", _same("softmax.int", "_softmax"), heads=True),
    PatternOp("layer_norm", (1, 3), "layer_norm(x, W, b)", {"layer_norm.default": (0, 2, 3)}, "norm"),
    PatternOp("rms_norm", (1, 2), "rms_norm(x, W) as one op", {"rms_norm.default": (0, 2)}, "norm"),
    PatternOp("group_norm", (1, 3), "group_norm(x, W, b)", {"group_norm.default": (0, 2, 3)}, "norm", heads=True),
    PatternOp("batch_norm", (1, 3), "batch_norm(x, W, b)", {"batch_norm.default": (0, 1, 2)}, "norm", heads=True),
    PatternOp("add", (2, 2), "the same as `a + b`, in either order", _same("add.Tensor", "add.Scalar", count=2), "sum",
              commutative=True),
    PatternOp("sub", (2, 2), "the same as `a - b`",
              {**_same("sub.Tensor", "sub.Scalar", count=2), "rsub.Scalar": (1, 0), "rsub.Tensor": (1, 0)}, "sum"),
    PatternOp("mul", (2, 2), "the same as `a * b`, in either order", _same("mul.Tensor", "mul.Scalar", count=2),
              "scale", commutative=True),
    PatternOp("div", (2, 2), "the same as `a / b`", _same("div.Tensor", "div.Scalar", count=2), "scale"),
    PatternOp("pow", (2, 2), "the same as `a ** b`",
              _same("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", count=2)),
    PatternOp("neg", (1, 1), "the same as `-x`", _same("neg")),
    *_ACTIVATIONS,
    PatternOp("activation", (1, 1), "any activation that is one op: relu, gelu, silu, ...",
              {target: slots for op in _ACTIVATIONS for target, slots in op.targets.items()}, "activation"),
    *(_pointwise(name, doc) for name, doc in (
        ("exp", "exponential"), ("log", "natural logarithm"), ("sqrt", "square root"),
        ("rsqrt", "1 / square root"), ("abs", "absolute value"), ("square", "x², as one op"), ("sin", "sine"),
        ("cos", "cosine"),
    )),
    PatternOp("mean", (1, 1), "mean over the last axis", _same("mean.dim")),
    PatternOp("sum", (1, 1), "sum over the last axis", _same("sum.dim_IntList")),
    PatternOp("amax", (1, 1), "largest entry over the last axis", _same("amax")),
    PatternOp("minimum", (2, 2), "the smaller of two, in either order", _same("minimum", count=2), commutative=True),
    PatternOp("maximum", (2, 2), "the larger of two, in either order", _same("maximum", count=2), commutative=True),
    PatternOp("clamp", (3, 3), "clamp(x, low, high)", _same("clamp", count=3)),
    PatternOp("where", (3, 3), "where(m, a, b)", _same("where.self", "where.ScalarOther", "where.ScalarSelf", count=3)),
    PatternOp("masked_fill", (3, 3), "masked_fill(x, mask, value)",
              _same("masked_fill.Scalar", "masked_fill.Tensor", count=3)),
    PatternOp("concat", (2, 16), "joined along any axis: concat(a, b)", {"cat.default": (0,)}, heads=True,
              variadic=True),
    PatternOp("dropout", (1, 1), "a dropout that must be there", _same("dropout")),
    PatternOp("cast", (1, 1), "a change of dtype or device that must be there",
              _same("to.dtype", "to.dtype_layout", "to.device", "_to_copy")),
    PatternOp("transpose", (1, 1), "a transpose or permutation that must be there",
              _same("transpose.int", "permute", "t"), heads=True),
    PatternOp("reshape", (1, 1), "a view or reshape that must be there",
              _same("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int"), heads=True),
)  # fmt: skip

PATTERN_OPS: dict[str, PatternOp] = {op.name: op for op in _TABLE}

OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "**": "pow", "@": "matmul"}
"""Python's operators as ops."""

WORDS = {
    "any": "one of several: any(silu(g), gelu(g)), or any(silu, gelu)(g)",
    "nearest": "the nearest such op upstream, past whatever stands between: nearest(linear(x, W_q))",
    "split": "parts of the last axis, in order: g, u = split(h)",
}
"""What looks like an op and is none."""
