"""The order of edits: what a row reads of `carry` is computed first, at each site, and what no row reads not at all.

    carry:  {z: {at: block, from: {y: "z[layer - 1] or start"}, value: ...}}
    deltas: {read: {at: block, modify: out, from: {z: "z[layer - 1] or start"}, form: ...}}

`read` at layer 2 needs `z` at layer 1, which needs that at layer 0: these come before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftc.diagnostics import fail
from peftc.planning.refer import Source

if TYPE_CHECKING:
    from peftc.planning.plan import Edit


def arranged(edits: Sequence[Edit]) -> list[Edit]:
    """The rows' edits in their order, each behind those of `carry` that it needs; E051 for a value that needs itself.

    Values that no row needs are left out.
    """
    values = {(edit.delta.name, id(edit.site)): edit for edit in edits if edit.delta.value is not None}
    if not values:
        return list(edits)
    found: dict[int, Edit] = {}
    for edit in edits:
        if edit.delta.value is None:
            for needed in _needed(edit, values):
                found.setdefault(id(needed), needed)
            found[id(edit)] = edit
    return list(found.values())


def _needed(edit: Edit, values: dict[tuple[str, int], Edit]) -> list[Edit]:
    """The edits of `carry` that `edit` needs, itself and through others, in the order of the dataflow.

    The walk keeps its own stack, for a chain is as long as a model is deep.
    """
    done: dict[int, Edit] = {}
    path: dict[int, Edit] = {}
    stack: list[tuple[Edit, list[Source]]] = [(edit, _sources(edit))]
    while stack:
        one, left = stack[-1]
        path[id(one)] = one
        if not left:
            stack.pop()
            del path[id(one)]
            done[id(one)] = one
            continue
        source = left.pop()
        needed = values.get((source.carried, id(source.site)))
        if needed is None or id(needed) in done:
            continue
        if id(needed) in path:
            message = f"`{source.reference.text}` of {one.site.describe()} is computed from itself"
            help = "a value may need those of other layers, as long as there is a first one"
            fail("E051", f"`{one.delta.name}`: {message}", span=source.reference.span, help=help)
        stack.append((needed, _sources(needed)))
    del done[id(edit)]
    return list(done.values())


def _sources(edit: Edit) -> list[Source]:
    return [source for source in edit.sources.values() if source.carried][::-1]
