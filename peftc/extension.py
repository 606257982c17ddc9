"""What a package needs that brings ops to peftc: `Op`, and what its writers are given.

    # peftc_gates/ops.py: the table. `peftc check` imports it, so it imports no torch
    from peftc.extension import Op

    OPS = [Op("squared_relu", (1, 1), "max(x, 0) squared", writer="peftc_gates.writers:squared_relu")]

    # peftc_gates/writers.py: imported when a graph is written
    import torch
    from peftc.extension import Builder

    def squared_relu(builder: Builder, x: torch.fx.Node) -> torch.fx.Node:
        positive = builder.call(torch.ops.aten.relu.default, x)
        return builder.call(torch.ops.aten.mul.Tensor, positive, positive)

`builder.call(target, *args, **kwargs)` writes one node that calls an aten op, and runs it on fake tensors at once:
`node.meta["val"].shape` is the shape of its result, and operands that do not fit raise there. An argument of the op is
a node, or a static value (a number, a word, a list of them) where the rule gives one. A package names its ops and its
folder of rules by entry points; see `peftc.lang.extensions`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peftc.lang.ops import Op

if TYPE_CHECKING:
    from peftc.ir.builder import Builder

__all__ = ["Builder", "Op"]


def __getattr__(name: str) -> object:
    if name != "Builder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("peftc.ir.builder").Builder
