"""Decisions: what becomes of every ledger entry when the model is folded.

| result   | when                                                                                        |
|----------|---------------------------------------------------------------------------------------------|
| merged   | h' is affine in h and in the input of the linear layer that makes (or takes) h; or h is a    |
|          | parameter and h' a function of parameters                                                    |
| widened  | h' = h + an affine function of act(an affine function of x), at an FFN with that x and act   |
| constant | the delta reads no activation: a prefix's keys and values, a prompt's rows                    |
| kept     | anything else, with the node and the reason                                                  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from peftc.fold.affine import Affine, Constant, Opaque, classify
from peftc.fold.widen import Widening, find_widening
from peftc.ir.program import Insertion, Program, is_call, module_path
from peftc.ir.sites import Linear, as_linear
from peftc.locate.walk import DROPOUT, PIECES, VIEWS

aten = torch.ops.aten

Result = Literal["merged", "widened", "constant", "kept"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one insertion; `into` is the linear it merges into, from the side of its output or its input."""

    insertion: Insertion
    result: Result
    reason: str = ""
    node: str = ""
    into: Linear | None = None
    side: Literal["output", "input", "parameter", ""] = ""
    unit: bool = False
    offset: bool = False
    widening: Widening | None = None

    @property
    def where(self) -> str:
        return f"{self.insertion.site.describe()}, tap `{self.insertion.tap}`"


def decide(program: Program) -> list[Decision]:
    """One decision for each ledger entry, in ledger order."""
    decisions: list[Decision] = []
    kept: set[fx.Node] = set()
    for insertion in program.ledger:
        decision = _decide(program, insertion)
        if insertion.original in kept and decision.result in ("merged", "widened"):
            decision = Decision(insertion, "kept", "an earlier delta at this tap stays", str(insertion.after))
        if decision.result == "kept":
            kept.update((insertion.written, insertion.after))
        decisions.append(decision)
    return decisions


def _decide(program: Program, insertion: Insertion) -> Decision:
    if insertion.lowering in ("concat", "gated", "prepend"):
        return _decide_constant(program, insertion)
    constants = set(program.placeholders("parameter").values())
    if insertion.tap in ("weight", "bias"):
        return _decide_parameter(program, insertion, constants)
    streams = _streams(insertion)
    kinds = classify(insertion.nodes, streams, constants)
    kind = kinds[insertion.after]
    if isinstance(kind, Affine):
        return _decide_affine(program, insertion, kind)
    if isinstance(kind, Opaque):
        widening, obstacle = find_widening(program, insertion, constants)
        if widening is not None:
            return Decision(insertion, "widened", widening=widening, node=str(insertion.after))
        why = f"{_op(kind.culprit)} is not affine in its input"
        return Decision(insertion, "kept", f"{why}; {obstacle}" if obstacle else why, str(kind.culprit))
    return Decision(insertion, "kept", "the new value does not depend on h", str(insertion.after))


def _op(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return f"`{packet.__name__ if packet is not None else node.target}`"


def _streams(insertion: Insertion) -> dict[fx.Node, str]:
    streams = {insertion.before: "h"}
    if insertion.x is not None and insertion.x is not insertion.before:
        streams[_uncast(insertion.x)] = "x"
    return streams


def _uncast(node: fx.Node) -> fx.Node:
    while is_call(node, aten.to.dtype):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _decide_constant(program: Program, insertion: Insertion) -> Decision:
    constants = set(program.placeholders("parameter").values())
    kinds = classify(insertion.nodes, {}, constants)
    rows = [node for node in (insertion.x, insertion.dh) if node is not None]
    if insertion.lowering == "gated":
        return Decision(insertion, "kept", "`lower: gated` keeps the gate λ as it is written", str(insertion.after))
    if all(isinstance(kinds[node], Constant) for node in rows):
        what = "rows of the prompt" if insertion.lowering == "prepend" else "keys and values of the prefix"
        return Decision(insertion, "constant", f"{what} are stored; they are no weight of the base", str(insertion.after))
    culprit = next(node for node in rows if not isinstance(kinds[node], Constant))
    return Decision(insertion, "kept", "the prefix depends on the input", str(culprit))


def _decide_parameter(program: Program, insertion: Insertion, constants: set[fx.Node]) -> Decision:
    kind = classify(insertion.nodes, {}, constants)[insertion.after]
    placeholder = insertion.site.taps[insertion.tap].node
    name = program.parameter_name(placeholder)
    if not isinstance(kind, Constant) or name is None:
        return Decision(insertion, "kept", "the new weight depends on the input", str(insertion.after))
    others = [user for user in placeholder.users if user is not insertion.site.taps[insertion.tap].user]
    others = [user for user in others if user not in insertion.nodes and not _own_write(program, user)]
    ties = [first for later, first in program.tied.items() if name in (later, first)]
    if others or ties:
        where = module_path(others[0]) if others else ties[0]
        return Decision(insertion, "kept", f"{name} is also used by {where}", str(placeholder))
    return Decision(insertion, "merged", node=str(insertion.after), side="parameter")


def _own_write(program: Program, user: fx.Node) -> bool:
    return any(user in entry.nodes for entry in program.ledger)


def _decide_affine(program: Program, insertion: Insertion, kind: Affine) -> Decision:
    unit = "h" in kind.unit
    producer = _producer(program, insertion)
    if producer is not None:
        if "x" in kind.streams and _uncast(insertion.x) is not producer.x:  # type: ignore[arg-type]
            return _through(program, insertion, kind, producer)
        if kind.offset and producer.bias_name is None:
            return Decision(
                insertion, "kept", f"it adds a bias, and {producer.weight_name.rpartition('.')[0]} has none",
                str(insertion.after),
            )  # fmt: skip
        blocked = _shared(program, producer)
        if blocked:
            return Decision(insertion, "kept", blocked, str(producer.node))
        return Decision(insertion, "merged", into=producer, side="output", unit=unit, offset=kind.offset, node=str(insertion.after))
    return _decide_consumer(program, insertion, kind, unit)


def _through(program: Program, insertion: Insertion, kind: Affine, producer: Linear) -> Decision:
    """An affine delta whose input is not the linear's own: widening may still take it, with a linear 'activation'."""
    reason = f"its input is not that of {module_path(producer.node)}, so it is no change of that weight"
    return Decision(insertion, "kept", reason, str(insertion.after))


def _shared(program: Program, linear: Linear) -> str:
    """Why a linear's weight cannot be changed for one site alone, or ""."""
    users = [user for user in linear.weight.users if not _own_write(program, user)]
    if len(users) > 1:
        return f"{linear.weight_name} is used in {len(users)} places"
    tied = [first for later, first in program.tied.items() if linear.weight_name in (later, first)]
    return f"{linear.weight_name} is tied to {tied[0]}" if tied else ""


def _producer(program: Program, insertion: Insertion) -> Linear | None:
    """The linear whose output, or a part of it, is h."""
    node = insertion.site.taps[insertion.tap].node
    while True:
        linear = as_linear(program, node)
        if linear is not None:
            return linear
        if node.op != "call_function" or not (is_call(node, *VIEWS, *PIECES) or _is_getitem(node)):
            return None
        node = node.args[0]  # type: ignore[assignment]


def _is_getitem(node: fx.Node) -> bool:
    from peftc.ir.program import is_getitem

    return is_getitem(node)


def _decide_consumer(program: Program, insertion: Insertion, kind: Affine, unit: bool) -> Decision:
    """h' feeds linears alone: h' = h B + c changes their weights to W B and their biases by W c."""
    if "x" in kind.streams:
        return Decision(insertion, "kept", "h comes from no linear layer with this input", str(insertion.after))
    consumers = _consumers(program, insertion.written)
    if consumers is None or len(consumers) != 1:
        return Decision(insertion, "kept", "h is neither made nor taken by a single linear layer", str(insertion.after))
    linear = consumers[0]
    if kind.offset and linear.bias_name is None:
        return Decision(insertion, "kept", f"it adds a bias, and {module_path(linear.node)} has none", str(insertion.after))
    blocked = _shared(program, linear)
    if blocked:
        return Decision(insertion, "kept", blocked, str(linear.node))
    return Decision(insertion, "merged", into=linear, side="input", unit=unit, offset=kind.offset, node=str(insertion.after))


def _consumers(program: Program, written: fx.Node) -> list[Linear] | None:
    found: list[Linear] = []
    for user in written.users:
        while is_call(user, *DROPOUT) and len(user.users) == 1:
            user = next(iter(user.users))
        linear = as_linear(program, user)
        if linear is None or linear.x is not written and not is_call(linear.x, *DROPOUT):
            return None
        found.append(linear)
    return found
