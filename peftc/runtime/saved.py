"""Tensors of stored delta directories, for parameters that start from them: `init: load(d, row.param)`.

A directory is opened once, when a start asks for it, and must have been made on the same base. A tensor is found by
the same site, tap, row and parameter; the model's head may be another one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftc.diagnostics import did_you_mean, fail
from peftc.runtime.delta_dir import DeltaDir

if TYPE_CHECKING:
    import torch

    from peftc.ir.initial import Saved
    from peftc.lang.rule import Rule
    from peftc.store.model_dir import ModelDir


class SavedDeltas:
    """Reads `Saved` tensors of deltas that were made on `base`."""

    def __init__(self, base: ModelDir) -> None:
        self._base = base
        self._opened: dict[str, DeltaDir] = {}

    def check(self, rule: Rule) -> None:
        """Refuse a rule whose stored deltas are not there, before any work. Raises `PeftcError` E014, E034, E035."""
        for delta in rule.deltas:
            for name, place in delta.places.items():
                self._open(name, place)

    def __call__(self, saved: Saved) -> torch.Tensor:
        """The tensor. Raises `PeftcError` E014, E034, E035, E040 (it is not there), E013 (of another shape)."""
        delta = self._open(saved.hyper, saved.place)
        name = self._find(delta, saved)
        shape = delta.header.tensors[name].shape
        if shape != saved.shape:
            message = f"{name} of {delta.path} is {list(shape)}, and {list(saved.shape)} is wanted"
            fail("E013", message, span=saved.span, help="set the sizes of this rule to those of the stored one")
        return delta.read(name)

    def _open(self, name: str, place: str | None) -> DeltaDir:
        from peftc.runtime.api import check_fingerprint

        if place is None:
            message = f"the rule starts from a stored delta, and nothing says where `{name}` lies"
            fail("E014", message, help=f"give the delta directory: --set {name}=DIR")
        if place not in self._opened:
            delta = DeltaDir.open(place)
            check_fingerprint(delta, self._base)
            self._opened[place] = delta
        return self._opened[place]

    def _find(self, delta: DeltaDir, saved: Saved) -> str:
        """The stored name: exactly the wanted one, or but for what a head puts in front of it."""
        rows = {row.name: row for row in delta.rule.deltas}
        row = rows.get(saved.slot.row)
        if row is None:
            message = f"{delta.path} has no row `{saved.slot.row}`; its rule is `{delta.rule.name}`"
            fail("E040", message, span=saved.span, help=did_you_mean(saved.slot.row, rows))
        parameters = [param.name for param in (*row.form.params, *row.params)]
        if saved.parameter not in parameters:
            message = f"row `{row.name}` of {delta.path} has no parameter `{saved.parameter}`"
            fail("E040", message, span=saved.span, help=did_you_mean(saved.parameter, parameters))
        slot = saved.slot if len(row.modify) > 1 else replace(saved.slot, tap="")
        wanted = slot.name(saved.parameter)
        near = [name for name in delta.header.tensors if name.endswith("." + wanted) or wanted.endswith("." + name)]
        found = [wanted] if wanted in delta.header.tensors else near
        if len(found) != 1:
            message = f"{delta.path} holds no {wanted}: its row `{row.name}` does not reach this site"
            fail("E040", message, span=saved.span, help="narrow the sites of this row to those of the stored one")
        return found[0]
