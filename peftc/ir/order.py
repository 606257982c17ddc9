"""The order of a graph: a traced graph is one of many orders of the same computation, and a new value may need another.

Where a tap is read before its new value can be computed, what reads it moves behind the new value, unless the new
value depends on what reads it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def make_room(readers: Iterable[fx.Node], until: fx.Node, needed: Iterable[fx.Node]) -> bool:
    """Move `readers`, and what depends on them, behind `until`; False, and nothing moved, where a needed node does."""
    early = {reader for reader in readers if reader < until}
    if not early:
        return True
    late: dict[fx.Node, None] = {}
    node = min(early)
    while True:
        if node in early or any(operand in late for operand in node.all_input_nodes):
            late[node] = None
        if node is until:
            break
        node = node.next
    if any(node in late for node in (until, *needed)):
        return False
    for node in late:
        until.append(node)
        until = node
    return True
