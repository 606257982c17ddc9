"""Two traces of one model must be rewritten alike: the deltas of the second are the parameters of the first."""

from __future__ import annotations

from peftc.plan import Plan


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
