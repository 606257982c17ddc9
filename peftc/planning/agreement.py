"""Two traces of one model must be rewritten alike: the deltas of the second are the parameters of the first.

A trace with more inputs may see more of the model: an image and its text reach the tower for images too, and what was
planned from text alone has nothing there. So a later trace is planned on the sites of the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftc.ir.sites import Site
    from peftc.planning.plan import Plan


def sites_like(first: Iterable[Site], later: Iterable[Site]) -> tuple[Site, ...]:
    """Those of `later` that are among `first`, with the layer and stack that they have there."""
    known = dict(_told_apart(first))
    found: list[Site] = []
    for key, site in _told_apart(later):
        if key in known:
            site.layer, site.stack = known[key].layer, known[key].stack
            site.dims.update({name: known[key].dims[name] for name in ("layer", "layers") if name in known[key].dims})
            found.append(site)
    return tuple(found)


def _told_apart(sites: Iterable[Site]) -> Iterable[tuple[tuple[object, ...], Site]]:
    """Each site under its kind, its path and what tells it from others there; calls of one module are counted."""
    calls = Counter[tuple[object, ...]]()
    for site in sites:
        key = (site.kind, site.variant, site.role, site.path, site.identity)
        calls[key] += 1
        yield (*key, calls[key]), site


def check_same(first: Plan, second: Plan) -> None:
    """Raise `RuntimeError` where two plans of one rule differ in an edit or a parameter: a defect of a finder."""
    ours, theirs = _edits(first), _edits(second)
    if ours != theirs:
        lost, found = [edit for edit in ours if edit not in theirs], [edit for edit in theirs if edit not in ours]
        raise RuntimeError(f"two traces of one model are rewritten differently: {lost[:3]} against {found[:3]}")
    shapes = [{name: p.shape for name, p in plan.parameters.items()} for plan in (first, second)]
    if shapes[0] != shapes[1]:
        names = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise RuntimeError(f"two traces of one model differ in the parameters {', '.join(names[:3])}")


def _edits(plan: Plan) -> list[tuple[object, ...]]:
    return [(edit.label, edit.site.describe(), edit.site.layer, edit.site.stack, edit.tap) for edit in plan.edits]
