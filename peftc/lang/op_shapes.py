"""The shapes of every op of `peftc.lang.ops`: what its operands must be, and what it gives.

A name stands for one size wherever it appears, `..` for axes in front, which broadcast. Where a row says all there is
to say it is the op's rule as it stands (`peftc.lang.shapes.signature`); the rules of the others, whose result hangs on
their arguments, are in `peftc.lang.shapes.rules`, and the row is their doc.
"""

from __future__ import annotations

from peftc.lang.ops import OPS

_ALIKE = (
    "roll flip fft_real fft_imag relu gelu gelu_tanh silu tanh sigmoid softplus identity softmax exp log sin cos sqrt "
    "rsqrt abs sign floor round clamp cumsum dropout detach"
)
_REDUCING = "logsumexp mean sum amax amin norm"
_BROADCAST = "minimum maximum greater less where ifft_real"

OP_SHAPES: dict[str, str] = {
    **dict.fromkeys(_ALIKE.split(), "[..] -> [..]"),
    **dict.fromkeys(_REDUCING.split(), "[.., n] -> [.., 1]"),
    **dict.fromkeys(_BROADCAST.split(), "[..], [..] -> [..]"),
    "linear": "[.., i], [o, i], [o] -> [.., o]",
    "matmul": "[.., m, n], [.., n, k] -> [.., m, k]",
    "einsum": "by the equation",
    "outer": "[m], [n] -> [m, n]",
    "kron": "[.., a, b], [.., c, d] -> [.., a * c, b * d]",
    "transpose": "[m, n] -> [n, m]",
    "permute": "[a, b, c] -> [a, c, b]",
    "reshape": "[a, b] -> [c, d], a b = c d",
    "flatten": "[m, n] -> [m * n]",
    "unflatten": "[.., m * n] -> [.., m, n]",
    "unsqueeze": "[m, n] -> [m, 1, n]",
    "squeeze": "[m, 1, n] -> [m, n]",
    "expand": "[m, 1] -> [m, n]",
    "repeat": "[m, n] -> [a * m, b * n]",
    "concat": "[.., m], [.., n] -> [.., m + n]",
    "stack": "[m], [m] -> [2, m]",
    "split_heads": "[.., s, h * d] -> [.., h, s, d]",
    "merge_heads": "[.., h, s, d] -> [.., s, h * d]",
    "gather": "[.., n], [k] -> [.., k]",
    "scatter": "[k], [k], [k] -> [m, n]",
    "place": "[k, ..], [k] -> [n, ..]",
    "size": "[.., n] -> n",
    "full": "[m, n] of the sizes given",
    "zeros": "sizes -> [m, n]",
    "ones": "sizes -> [m, n]",
    "eye": "n -> [n, n]",
    "range": "n -> [n]",
    "diag": "[.., n] -> [.., n, n]",
    "block_diag": "[.., k, m, n] -> [.., k * m, k * n]",
    "diagonal": "[.., n, n] -> [.., n]",
    "skew": "[.., n (n - 1) / 2] -> [.., n, n]",
    "circulant": "[.., n] -> [.., n, n]",
    "triu": "[.., m, n] -> [.., m, n]",
    "tril": "[.., m, n] -> [.., m, n]",
    "orthonormal": "[.., m, n] -> [.., m, n]",
    "solve": "[.., n, n], [.., n, k] -> [.., n, k]",
    "inverse": "[.., n, n] -> [.., n, n]",
    "ifft2_real": "[.., m, n] -> [.., m, n]",
    "layer_norm": "[.., n], [n], [n] -> [.., n]",
    "rms_norm": "[.., n], [n] -> [.., n]",
}


def shapes_of(name: str) -> str:
    """The row of an op, what an extension says of its op, or `not known`."""
    return OP_SHAPES.get(name) or OPS[name].shapes or "not known"
