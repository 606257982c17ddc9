"""The op table of rule expressions: each name, its arguments, one line of doc.

This module holds no torch; `peftc.lang.op_writers` writes each op as torch.fx nodes. An op's arguments are tensors
unless they are listed in `static`, which take numbers, words or lists known when the graph is written. `OPS` holds the
library's ops and those that installed packages bring (`peftc.lang.extensions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Op:
    """One named op: at least `arity[0]` and at most `arity[1]` positional arguments, `keywords` by name.

    The last two are for ops of extensions; the library's stand in `peftc.lang.op_writers` and `peftc.lang.op_shapes`.
    `writer` is "module:function", a function that takes the builder and the op's arguments and gives a node. `shapes`
    says what it makes of shapes, as in "[.., n], [n] -> [.., n]"; where nothing is said, any shape is admitted.
    """

    name: str
    arity: tuple[int, int]
    doc: str
    keywords: tuple[str, ...] = ()
    writer: str = ""
    shapes: str = ""


_TABLE = (
    Op("linear", (2, 3), "x Wᵀ + b on the last axis; W is [out, in], b is [out] or absent"),
    Op("matmul", (2, 2), "the same as `a @ b`"),
    Op("einsum", (2, 5), "einsum('bsd,rd->bsr', x, W)"),
    Op("outer", (2, 2), "outer product of two vectors, [m] and [n] to [m, n]"),
    Op("kron", (2, 2), "Kronecker product of the last two axes, [.., a, b] and [.., c, d] to [.., a c, b d]"),
    Op("transpose", (3, 3), "swap two axes"),
    Op("permute", (2, 2), "axes in a new order: permute(x, [0, 2, 1])"),
    Op("reshape", (2, 2), "reshape(x, [a, b]); -1 once for the rest"),
    Op("flatten", (1, 3), "axes first to last made one: flatten(x, 1, 2); all of them without"),
    Op("unflatten", (3, 3), "one axis made several: unflatten(x, -1, [heads, head_dim])"),
    Op("unsqueeze", (2, 2), "a new axis of size 1"),
    Op("squeeze", (2, 2), "drop an axis of size 1"),
    Op("expand", (2, 2), "axes of size 1 made longer: expand(x, [n, d]); -1 keeps an axis"),
    Op("repeat", (2, 2), "copies along each axis: repeat(x, [1, n])"),
    Op("roll", (2, 2), "turn the last axis, or dim, by a number of places", ("dim",)),
    Op("flip", (1, 1), "the last axis, or dim, backwards", ("dim",)),
    Op("concat", (2, 8), "join along an axis: concat(a, b, dim=-1)", ("dim",)),
    Op("stack", (2, 8), "stack along a new axis: stack(a, b, dim=0)", ("dim",)),
    Op("split_heads", (2, 2), "[B, S, heads * head_dim] to [B, heads, S, head_dim]; the second argument is heads"),
    Op("merge_heads", (1, 1), "[B, heads, S, head_dim] to [B, S, heads * head_dim]"),
    Op("gather", (2, 2), "entries of the last axis, or dim: gather(x, [0, 2]); the index may be a vector", ("dim",)),
    Op("scatter", (4, 4), "scatter(v, rows, columns, [m, n]): zeros with v[k] added at rows[k], columns[k]"),
    Op("place", (3, 3), "place(v, ids, n): n rows of zeros with v[k] at row ids[k]; ids is a list of whole numbers"),
    Op("size", (2, 2), "the size of an axis, in a tensor's axes counted from 0: size(ids, 0) is the batch"),
    Op(
        "full",
        (2, 2),
        "full([m, n], c): all equal to the number c; in the type of another tensor with like=ids",
        ("like",),
    ),
    Op("zeros", (1, 1), "zeros of the given sizes: zeros([r, d_in])"),
    Op("ones", (1, 1), "ones of the given sizes"),
    Op("eye", (1, 1), "the n by n identity matrix"),
    Op("range", (1, 1), "the numbers 0 to n - 1"),
    Op("diag", (1, 1), "the diagonal matrix of a vector, [.., n] to [.., n, n]"),
    Op("block_diag", (1, 1), "the matrix with the k matrices m by n along its diagonal, zero elsewhere"),
    Op("diagonal", (1, 1), "the diagonal of a matrix, [.., n, n] to [.., n]"),
    Op("triu", (1, 2), "the upper triangle, from the k-th diagonal: triu(x, 1)"),
    Op("tril", (1, 2), "the lower triangle, to the k-th diagonal: tril(x, -1)"),
    Op("skew", (1, 1), "the skew-symmetric matrix with v above its diagonal, [.., n (n - 1) / 2] to [.., n, n]"),
    Op("circulant", (1, 1), "row i is w turned by i places: entry (i, j) is w[(j - i) mod n], [.., n] to [.., n, n]"),
    Op("orthonormal", (1, 1), "the rows made orthonormal, one after the other; ONNX lacks it, so only of parameters"),
    Op("solve", (2, 2), "A^-1 B for square A; ONNX lacks it, so only of parameters"),
    Op("inverse", (1, 1), "A^-1 for square A; ONNX lacks it, so only of parameters"),
    Op("fft_real", (1, 1), "real part of the discrete Fourier transform along the last axis, or dim", ("dim",)),
    Op("fft_imag", (1, 1), "imaginary part of the discrete Fourier transform", ("dim",)),
    Op("ifft_real", (1, 2), "real part of the inverse transform of a spectrum: ifft_real(re, im) or (re)", ("dim",)),
    Op("ifft2_real", (1, 1), "real part of the inverse transform over the last two axes"),
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
    Op("sin", (1, 1), "sine"),
    Op("cos", (1, 1), "cosine"),
    Op("sqrt", (1, 1), "square root"),
    Op("rsqrt", (1, 1), "1 / square root"),
    Op("abs", (1, 1), "absolute value"),
    Op("sign", (1, 1), "-1, 0 or 1"),
    Op("floor", (1, 1), "the whole number below"),
    Op("round", (1, 1), "the nearest whole number, of two the even one"),
    Op("clamp", (3, 3), "clamp(x, low, high)"),
    Op("minimum", (2, 8), "the smallest of its arguments, entry by entry"),
    Op("maximum", (2, 8), "the largest of its arguments, entry by entry"),
    Op("greater", (2, 2), "1 where a > b, else 0"),
    Op("less", (2, 2), "1 where a < b, else 0"),
    Op("where", (3, 3), "where(m, a, b): a where m is not 0, else b"),
    Op("mean", (1, 1), "mean over dim (the last axis), kept", ("dim",)),
    Op("sum", (1, 1), "sum over dim (the last axis), kept", ("dim",)),
    Op("cumsum", (1, 1), "running sum along the last axis, or dim", ("dim",)),
    Op("amax", (1, 1), "largest entry over dim (the last axis), kept", ("dim",)),
    Op("amin", (1, 1), "smallest entry over dim (the last axis), kept", ("dim",)),
    Op("norm", (1, 1), "Euclidean norm over dim (the last axis), kept", ("dim",)),
    Op("layer_norm", (3, 3), "layer_norm(x, weight, bias) over the last axis", ("eps",)),
    Op("rms_norm", (2, 2), "rms_norm(x, weight) over the last axis", ("eps",)),
    Op("dropout", (2, 2), "dropout(x, p) while training"),
    Op("detach", (1, 1), "x itself, through which no gradient flows"),
)

LIBRARY_OPS: dict[str, Op] = {op.name: op for op in _TABLE}


class _Ops(Mapping[str, Op]):
    """The library's ops, then those of extensions, which are looked for when a name is not the library's."""

    def __getitem__(self, name: str) -> Op:
        from peftc.lang.extensions import extension_ops

        return LIBRARY_OPS[name] if name in LIBRARY_OPS else extension_ops().items[name]

    def __iter__(self) -> Iterator[str]:
        from peftc.lang.extensions import extension_ops

        yield from LIBRARY_OPS
        yield from extension_ops().items

    def __len__(self) -> int:
        return sum(1 for _ in self)


OPS: Mapping[str, Op] = _Ops()

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

INIT_OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("svd_u", (2, 2), "the first r left singular vectors of a matrix, as columns: [m, n] to [m, r]"),
        Op("svd_s", (2, 2), "the r largest singular values, falling: [m, n] to [r]"),
        Op("svd_vt", (2, 2), "the first r right singular vectors, as rows: [m, n] to [r, n]"),
        Op("qr_q", (1, 1), "Q of W = Q R, orthonormal columns: [m, n] to [m, min(m, n)]"),
        Op("qr_r", (1, 1), "R of W = Q R, upper triangular with no negative diagonal: [m, n] to [min(m, n), n]"),
        Op("sort", (1, 1), "entries in rising order along the last axis, or dim", ("dim",)),
        Op("topk", (2, 2), "the k entries of largest magnitude of the whole tensor, the largest first"),
        Op("topk_rows", (2, 2), "the rows (next to last axis) of a matrix where these k entries stand"),
        Op("topk_columns", (2, 2), "the columns (last axis) where they stand"),
        Op("topk_mask", (2, 2), "1 where one of these k entries stands, else 0"),
        Op("load", (1, 2), "a tensor of the stored delta at --set d=DIR, at this site: load(d, row.param), or load(d)"),
    )
}
"""Ops of `init:` alone. Every left singular vector has its entry of largest magnitude positive, so signs are fixed."""
