"""mix: write the deltas of several plans into one graph, each with a weight of its own.

At every tap that a plan changes, h' of each plan is computed of the same h, and what goes on is

    h + Σ w (h' - h)

So what is mixed is what the deltas do to a value, not their parameters; deltas that read a value downstream see it
mixed. A base tensor that a plan trains is such a value too: h is the base's, h' the trained one. The weights are inputs
of the graph, so other weights need no other trace. Attention over a prefix is written with its gate (h' is then a value
at the tap), which is the same function.

Invariant: plans bring parameters under names of their own, and are of the program as it was before any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.ir.builder import Builder, latest
from peftc.ir.initial import Init
from peftc.ir.order import make_room
from peftc.ir.program import DeltaParameter, Insertion, Program
from peftc.ir.sites import Tap
from peftc.passes.insert import insert_edit
from peftc.planning.plan import Edit, Plan

aten = torch.ops.aten

WEIGHTS = "peftc_mix"
"""A graph reads the weight of a plan under this name and the plan's."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Write `plans` into the program; `trained` are the names under which each has base tensors of its own."""

    name: ClassVar[str] = "mix"
    plans: Mapping[str, Plan]
    trained: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By plan: the base's name of a tensor to that of the plan's own."""

    def apply(self, program: Program) -> None:
        """Raises `PeftcError` E048 for a delta that changes no value alone."""
        for name, plan in self.plans.items():
            for edit in plan.edits:
                _check(name, edit)
        for node, own in self._trained_placeholders(program):
            _Mixer(program, Tap("weight", node), None).mix(own)
        for edits in self._by_tap().values():
            edit = edits[0][1]
            _Mixer(program, edit.site.taps[edit.tap], edit).insert(self.plans, edits)
        program.graph.lint()

    def _trained_placeholders(self, program: Program) -> Iterator[tuple[fx.Node, dict[str, fx.Node]]]:
        """Each placeholder of a base tensor that plans train, with those of the plans' own tensors."""
        for name, node in program.placeholders("parameter").items():
            first, value = program.tied.get(name, name), node.meta["val"]
            own = {
                plan: program.add_parameter(
                    DeltaParameter(names[first], tuple(value.shape), value.dtype, Init("zeros"))
                )
                for plan, names in self.trained.items()
                if first in names
            }
            if own:
                yield node, own

    def _by_tap(self) -> dict[tuple[fx.Node, fx.Node | None], list[tuple[str, Edit]]]:
        """The edits of all plans by the value that they change; those of one plan in its order."""
        found: dict[tuple[fx.Node, fx.Node | None], list[tuple[str, Edit]]] = {}
        for name, plan in self.plans.items():
            for edit in plan.edits:
                tap = edit.site.taps[edit.tap]
                found.setdefault((tap.node, tap.user), []).append((name, edit))
        return found


def _check(name: str, edit: Edit) -> None:
    delta = edit.delta
    reason = ""
    if delta.value is not None:
        reason = f"it carries `{delta.name}` from layer to layer"
    elif delta.sets:
        reason = f"`{delta.name}` replaces several values together"
    elif delta.compose.text == "prepend":
        reason = f"`{delta.name}` makes the sequence longer"
    if reason:
        help = "mix states whose rows change one value each; `per_sample` takes any"
        fail("E048", f"the state `{name}` cannot be mixed: {reason}", span=delta.span, help=help)


class _Mixer:
    """Mixes what plans make of one value."""

    def __init__(self, program: Program, tap: Tap, edit: Edit | None) -> None:
        self.program, self.tap, self.edit = program, tap, edit
        self.base = tap.current(program)
        self.own: set[fx.Node] = set()
        """Nodes that go on reading the base's value."""

    def insert(self, plans: Mapping[str, Plan], edits: list[tuple[str, Edit]]) -> None:
        """Insert the edits of each plan on the base's value, and mix what they make of it."""
        written: dict[str, fx.Node] = {}
        for name in dict.fromkeys(name for name, _ in edits):
            for edit in (edit for other, edit in edits if other == name):
                entry = insert_edit(self.program, _gated(edit), plans[name].rule.hyper)
                self.program.ledger.append(entry)
                self.own |= {*entry.nodes, *entry.held}
            written[name] = self.tap.current(self.program)
            self._restore(written[name])
        after, nodes = self.mix(written)
        site, tap = edits[0][1].site, edits[0][1].tap
        entry = Insertion("mix", site, tap, "mix", self.base, after, None, None, self.base, after, tuple(nodes), ())
        self.program.ledger.append(entry)

    def _restore(self, written: fx.Node) -> None:
        """Let the rest of the graph read the base's value again: the next plan starts from it."""
        program, node = self.program, self.base
        if self.tap.user is not None:
            self.tap.user.replace_input_with(written, node)
            del program.replaced_at[self.tap.node, self.tap.user]
            return
        written.replace_all_uses_with(node)
        while node in program.replaced:
            node = program.replaced.pop(node)

    def mix(self, written: Mapping[str, fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
        """Put h + Σ w (h' - h) in the place of h; the node of it, and all that were written for it."""
        program, dtype = self.program, self.base.meta["val"].dtype
        weights = {name: program.add_parameter(_weight(name)) for name in written}
        start = latest(program.graph, [self.base, *written.values(), *program.bindings])
        self._make_room(start, [self.base, *written.values()])
        builder = Builder(program, start, label="mix", like=self._stack_source())
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        h = total = builder.cast(self.base, wide)
        for name, node in written.items():
            change = builder.call(aten.sub.Tensor, builder.cast(node, wide), h)
            total = builder.call(aten.add.Tensor, total, builder.call(aten.mul.Tensor, change, weights[name]))
        after = builder.cast(total, dtype)
        self._put(after, {*self.own, *builder.nodes})
        return after, builder.nodes

    def _stack_source(self) -> fx.Node:
        taps = self.edit.site.taps if self.edit is not None else {}
        return taps["out"].node if "out" in taps else self.tap.node

    def _make_room(self, start: fx.Node, needed: list[fx.Node]) -> None:
        readers = [self.tap.user] if self.tap.user is not None else [*self.base.users]
        if not make_room([reader for reader in readers if reader not in self.own], start, needed):
            raise AssertionError(f"{self.tap.name} is read before its deltas can be computed")

    def _put(self, after: fx.Node, own: set[fx.Node]) -> None:
        if self.tap.user is not None:
            self.tap.user.replace_input_with(self.base, after)
            self.program.replaced_at[self.tap.node, self.tap.user] = after
        else:
            self.base.replace_all_uses_with(after, delete_user_cb=lambda user: user not in own)
            self.program.replaced[self.base] = after


def _gated(edit: Edit) -> Edit:
    """The edit with attention over a prefix written as h + λ (dh - h), not as longer keys."""
    return edit if edit.delta.form.attend is None else replace(edit, delta=replace(edit.delta, lower="gated"))


def _weight(name: str) -> DeltaParameter:
    """A number: float64, which widens no tensor."""
    return DeltaParameter(f"{WEIGHTS}.{name}", (), torch.float64, Init("ones"), frozen=True)
