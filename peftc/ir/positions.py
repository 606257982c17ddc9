"""Whether a prefix is seen from places that padding shifts.

Rotary positions make a product of a query and a key depend on how far they are from each other, so a text means the
same wherever it begins. The rows of a prefix are not turned: a query at place 5 sees them otherwise than one at place
0. Where a model counts its places from the first column, and not from the mask or from positions that it is given, a
row that is padded at the left therefore sees the prefix from further away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from peftc.ir.program import Program, is_call

aten = torch.ops.aten

_MADE = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_ENDS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.conv1d.default, aten.embedding.default)


def prefix_counted_from_the_first_column(program: Program) -> str | None:
    """The delta whose rows are seen so, by its name; None where there is none."""
    for entry in program.ledger:
        region = entry.site.region
        if region is None or entry.lowering not in ("concat", "gated"):
            continue
        if any(_counted(node) for node in _before(region.operands()[:1], _ENDS) if is_call(node, aten.cos.default)):
            return entry.delta
    return None


def _counted(angles: fx.Node) -> bool:
    """Whether angles come from a count of columns, with no input that says where a text begins."""
    found = list(_before([angles], (aten.sym_size.int,)))
    given = any(node.op == "placeholder" and _is_whole(node) for node in found)
    return not given and any(is_call(node, *_MADE) and any(isinstance(a, fx.Node) for a in node.args) for node in found)


def _is_whole(node: fx.Node) -> bool:
    """Mask and positions are whole numbers; tables of frequencies are not."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _before(start: Iterable[fx.Node], ends: tuple[object, ...]) -> Iterator[fx.Node]:
    """Every node that feeds `start`, not looking past `ends`."""
    seen: set[fx.Node] = set()
    queue = list(start)
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if not is_call(node, *ends):
                queue.extend(node.all_input_nodes)
