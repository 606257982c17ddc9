"""The table of ops. `peftc check` imports it, so nothing here imports torch."""

from __future__ import annotations

from peftc.extension import Op

OPS = [
    Op(
        "squared_relu",
        (1, 1),
        "max(x, 0) squared (So et al. 2021)",
        writer="peftc_squared.writers:squared_relu",
        shapes="[..] -> [..]",
    ),
]
