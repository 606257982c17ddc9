"""The joint graph: a base with the deltas of several structures, every value of theirs an input with a neutral default.

The structures are inserted one after the other, each on what the ones before it made, which is the base's own while
their defaults hold. Names are those of the parameters with `peftc` replaced by the name of the structure, so they are
unique: `encoder.layer.0.attention.lora.lora.q.A`. A number that follows a hyperparameter (alpha / r) is an input of one
entry beside them, for the files take no number without an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.hotswap.neutral import Proof, neutral_value
from peftc.hotswap.sizes import Shape, insert, with_open
from peftc.hotswap.structure import Structure, numbers_in
from peftc.ir.builder import Builder
from peftc.ir.copying import copied
from peftc.ir.initial import Init
from peftc.ir.program import Binding, DeltaParameter, Insertion, Program, is_call
from peftc.passes.set_mode import SetMode
from peftc.planning.plan import Plan, make_plan

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class OptionalInput:
    """An input with a default: every entry `neutral`, or (None) the base's own tensor. Words in `shape` are open."""

    name: str
    shape: Shape
    dtype: torch.dtype
    neutral: float | None = None

    @property
    def default_shape(self) -> tuple[int, ...]:
        return tuple(0 if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """Deltas of one structure, under the name that their inputs bear."""

    name: str
    structure: Structure
    members: tuple[str, ...]
    """The adapters that have it."""

    def renamed(self, parameter: str) -> str:
        """The name of an input, from that of the parameter."""
        parts = parameter.split(".")
        parts[parts.index("peftc")] = self.name
        return ".".join(parts)


@dataclass(slots=True)
class Joint:
    """The program, its optional inputs by name, and which of them stand for numbers."""

    program: Program
    inputs: dict[str, OptionalInput] = field(default_factory=dict)
    numbers: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """By group: the input's name to the entry of the ledger and the number in it."""


def joint_program(base: Program, groups: Sequence[Group], trained: Sequence[str], fresh: frozenset[str]) -> Joint:
    """Insert the groups' deltas into a copy of `base`; base tensors under `trained` become optional inputs too.

    Raises `PeftcError` E090 for deltas without a neutral form.
    """
    joint = Joint(copied(base))
    program, defaults, symbols = joint.program, dict[str, float](), set[Any]()
    owners: dict[int, Group] = {}
    plans = [make_plan(group.structure.rule, program, fresh=fresh) for group in groups]  # on the base's graph
    for group, own in zip(groups, plans, strict=True):
        shapes = _shapes(group)
        plan, opened = with_open(_renamed(group, own), program, shapes)
        start = len(program.ledger)
        insert(plan, program)
        symbols |= {symbol.node.expr for symbol in opened.values()}
        for parameter in plan.parameters.values():
            name, value = parameter.name, neutral_value(parameter)
            joint.inputs[name], defaults[name] = OptionalInput(name, shapes[name], parameter.dtype, value), value
        entries = program.ledger[start:]
        owners.update((id(entry), group) for entry in entries)
        joint.numbers[group.name] = _lift(joint, group, entries, defaults)
    SetMode(training=False).apply_to(program.graph)
    _refuse_unproved(Proof(program, defaults, symbols), owners)
    _gather_repeats(program)
    _free(joint, trained)
    return joint


def _shapes(group: Group) -> dict[str, Shape]:
    """The shapes of a group's inputs, with words that are the group's own."""
    return {
        group.renamed(name): tuple(f"{group.name}_{size}" if isinstance(size, str) else size for size in shape)
        for name, shape in group.structure.shapes.items()
    }


def _renamed(group: Group, plan: Plan) -> Plan:
    own = {p.name: replace(p, name=group.renamed(p.name)) for p in plan.parameters.values()}
    edits = (
        replace(edit, parameters={key: None if p is None else own[p.name] for key, p in edit.parameters.items()})
        for edit in plan.edits
    )
    return replace(plan, edits=tuple(edits))


def _lift(
    joint: Joint, group: Group, entries: list[Insertion], defaults: dict[str, float]
) -> dict[str, tuple[int, int]]:
    """Put a parameter in the place of every lifted number."""
    found: dict[str, tuple[int, int]] = {}
    for rank, entry in enumerate(entries):
        for index, (node, place, number) in enumerate(numbers_in(entry)):
            if (entry.delta, index) in group.structure.lifted:
                name = _unique(f"{entry.site.path}.{group.name}.{entry.delta}.number_{index}".lstrip("."), joint.inputs)
                operand = node.args[1 - place]
                assert isinstance(operand, fx.Node)
                dtype = operand.meta["val"].dtype
                parameter = DeltaParameter(name, (1,), dtype, Init("constant", (number,)), True, entry.delta)
                node.update_arg(place, joint.program.add_parameter(parameter))
                joint.inputs[name], defaults[name] = OptionalInput(name, (1,), dtype, number), number
                found[name] = (rank, index)
    return found


def _unique(name: str, taken: Mapping[str, object]) -> str:
    return next(n for i in range(len(taken) + 2) if (n := name if i == 0 else f"{name}_{i}") not in taken)


def _refuse_unproved(proof: Proof, owners: Mapping[int, Group]) -> None:
    failed: dict[str, Insertion] = {}
    for entry in proof.failed:
        failed.setdefault(owners[id(entry)].name, entry)
    for group in {group.name: group for group in owners.values()}.values():
        if group.name in failed:
            entry = failed[group.name]
            what = "makes the sequence longer" if entry.lowering == "prepend" else "is not the base's value"
            fail(
                "E090",
                f"{group.members[0]} cannot be an optional input: delta `{entry.delta}` at {entry.site.describe()} "
                f"{what} with every open size 0 and the rest at its start",
                help="merge it (`peftc merge`), or export it by itself with `--export onnx`",
            )


def _gather_repeats(program: Program) -> None:
    """Repeat heads by index: the other op is written with a reshape, to which a size of 0 says "as before"."""
    for node in list(program.graph.nodes):
        if node in program.inserted and is_call(node, aten.repeat_interleave.self_int):
            rows, times, axis = node.args
            size = rows.meta["val"].shape[axis]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportArgumentType]
            builder = Builder(program, node, label=node.meta["custom"]["peftc"], like=node)
            places = builder.call(aten.arange.default, size * times, dtype=torch.int64, device=node.meta["val"].device)
            places = builder.call(aten.div.Tensor_mode, places, times, rounding_mode="floor")
            node.replace_all_uses_with(builder.call(aten.index_select.default, rows, axis, places))


def _free(joint: Joint, trained: Sequence[str]) -> None:
    """Turn the parameters that are inputs into inputs of the program, behind its own."""
    program = joint.program
    placeholders = program.placeholders("parameter")
    for name in trained:
        value = placeholders[name].meta["val"]
        joint.inputs[name] = OptionalInput(name, tuple(int(size) for size in value.shape), value.dtype)
    for name, first in program.tied.items():
        if first in joint.inputs and name in placeholders:
            placeholders[name].replace_all_uses_with(placeholders[first])
    last = list(program.placeholders("input").values())[-1]
    bindings = dict(program.bindings)
    for name in joint.inputs:
        node = placeholders[name]
        last.append(node)
        last = node
        del bindings[node]
        bindings[node] = Binding("input", name)
    program.bindings = bindings
    program.graph.eliminate_dead_code()
    program.graph.lint()
