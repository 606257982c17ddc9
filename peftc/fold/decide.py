"""Decisions: what becomes of every ledger entry when the model is folded.

| result   | when                                                                                        |
|----------|---------------------------------------------------------------------------------------------|
| merged   | h' is affine in h and in the input of the linear layer that makes (or takes) h; or h is a    |
|          | parameter and h' a function of parameters                                                    |
| widened  | h' = h + an affine function of act(an affine function of x), at an FFN with that x and act   |
| constant | the delta reads no activation: a prefix's keys and values, a prompt's rows                    |
| kept     | anything else, with the node and the reason                                                  |

Each entry is judged by itself first. Entries that meet are then settled together: one that stays keeps those in place
whose numbers would have to move past it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from peftc.fold.affine import Affine, Constant, Opaque, classify
from peftc.fold.linears import Reach, readers_of, short_name
from peftc.fold.widen import Widening, find_widening
from peftc.ir.program import Insertion, Program, is_call
from peftc.ir.sites import Linear

aten = torch.ops.aten

Result = Literal["merged", "widened", "constant", "kept"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one insertion; `into` is the linear it merges into, from the side of its output or its input.

    `unit` says that h' = h + .., `reads_x` that x is in it, `offset` that a constant may be.
    """

    insertion: Insertion
    result: Result
    reason: str = ""
    node: str = ""
    into: Linear | None = None
    side: Literal["output", "input", "parameter", ""] = ""
    unit: bool = False
    reads_x: bool = False
    offset: bool = False
    widening: Widening | None = None
    lacks: str = ""
    """The weight beside which it needs a bias that is not there."""
    met: tuple[Insertion, ...] = ()
    """Ledger entries between the tap and the linear, and (from the input's side) those that read h'."""

    @property
    def where(self) -> str:
        return f"{self.insertion.site.describe()}, tap `{self.insertion.tap}`"

    @property
    def folds(self) -> bool:
        """Whether the delta leaves the graph."""
        return self.result in ("merged", "widened")


@dataclass(frozen=True, slots=True)
class Room:
    """What a result has beyond the program's own tensors: for a weight's name the bias to be created beside it, and,
    without `ties`, no need that all names of a tied tensor mean what they meant."""

    biases: Mapping[str, str] = field(default_factory=dict)
    ties: bool = True


def decide(program: Program, room: Room | None = None) -> list[Decision]:
    """One decision for each ledger entry, in ledger order."""
    room = room or Room()
    reach = Reach(program, ties=room.ties, biases=room.biases)
    decisions = [_decide(reach, insertion) for insertion in program.ledger]
    settled = False
    while not settled:
        of = {id(d.insertion): d for d in decisions}
        after = [_settle(reach, decision, lambda entry, of=of: of[id(entry)]) for decision in decisions]
        settled = all(new is old for new, old in zip(after, decisions, strict=True))
        decisions = after
    return decisions


def _kept(insertion: Insertion, reason: str, node: fx.Node | None = None) -> Decision:
    return Decision(insertion, "kept", reason, str(insertion.after if node is None else node))


def _decide(reach: Reach, insertion: Insertion) -> Decision:
    if insertion.lowering in ("concat", "gated", "prepend"):
        return _decide_constant(reach, insertion)
    entangled = _entangled(reach, insertion)
    if entangled:
        return _kept(insertion, entangled)
    if insertion.site.taps[insertion.tap].is_parameter:
        return _decide_parameter(reach, insertion)
    kind = classify(insertion.nodes, reach.streams(insertion), reach.parameters)[insertion.after]
    if isinstance(kind, Affine):
        return _decide_affine(reach, insertion, kind)
    if isinstance(kind, Constant):
        return _kept(insertion, "the new value does not depend on h")
    widening, obstacle = find_widening(reach, insertion)
    if widening is not None:
        path = reach.producer(insertion)
        met = () if path is None else path.met
        return Decision(insertion, "widened", node=str(insertion.after), widening=widening, met=met)
    return _kept(insertion, f"{kind.reason}; {obstacle}" if obstacle else kind.reason, kind.culprit)


def _entangled(reach: Reach, insertion: Insertion) -> str:
    """What ties one tap of a rewrite to another: a fold of either would change what the other reads, or ""."""
    if insertion.group is None:
        return ""
    for other in reach.program.ledger:
        if other.group is insertion.group and other is not insertion:
            if other.original in insertion.reads:
                return f"it reads `{other.tap}` as it was, which the same rewrite replaces"
            if insertion.original in other.reads:
                return f"the same rewrite reads `{insertion.tap}` as it was for `{other.tap}`"
    return ""


def _decide_constant(reach: Reach, insertion: Insertion) -> Decision:
    if insertion.lowering == "gated":
        return _kept(insertion, "`lower: gated` keeps the gate λ as it is written")
    kinds = classify(insertion.nodes, {}, reach.parameters)
    for node in (insertion.x, insertion.dh):
        if node is not None and not isinstance(kinds[node], Constant):
            return _kept(insertion, "the prefix depends on the input", node)
    what = "rows of the prompt" if insertion.lowering == "prepend" else "keys and values of the prefix"
    reason = f"{what} are stored; they are no weight of the base"
    return Decision(insertion, "constant", reason, str(insertion.after))


def _decide_parameter(reach: Reach, insertion: Insertion) -> Decision:
    kind = classify(insertion.nodes, {}, [*reach.parameters, insertion.original])[insertion.after]
    if isinstance(kind, Opaque):
        return _kept(insertion, f"the new {insertion.tap} depends on the input: {kind.reason}", kind.culprit)
    placeholder = insertion.site.taps[insertion.tap].node
    name = reach.program.parameter_name(placeholder)
    if name is None:
        return _kept(insertion, f"{placeholder} is no parameter", placeholder)
    taps = [entry.site.taps[entry.tap] for entry in (insertion, *reach.twins(insertion))]
    blocked = reach.used_elsewhere(name, placeholder, {tap.user for tap in taps if tap.user is not None})
    if blocked:
        return _kept(insertion, blocked, placeholder)
    return Decision(insertion, "merged", node=str(insertion.after), side="parameter")


def _decide_affine(reach: Reach, insertion: Insertion, kind: Affine) -> Decision:
    path = reach.producer(insertion)
    if path is None:
        return _decide_consumer(reach, insertion, kind)
    linear = path.linear
    if "x" in kind.streams and not _same_value(reach.input_of(insertion), linear.node.args[0]):
        reason = f"its input is not that of `{short_name(linear)}`, so it is no change of that weight"
        return _kept(insertion, reason)
    return _merged(reach, insertion, kind, linear, "output", path.met)


def _decide_consumer(reach: Reach, insertion: Insertion, kind: Affine) -> Decision:
    """h' feeds one linear alone: h' = h B + c changes its weight to W Bᵀ and its bias by W c."""
    path = reach.consumer(insertion)
    if path is None:
        return _kept(insertion, "h is neither made nor taken by a single linear layer")
    if "x" in kind.streams:
        return _kept(insertion, "h comes from no linear layer with this input")
    return _merged(reach, insertion, kind, path.linear, "input", path.met)


def _merged(
    reach: Reach,
    insertion: Insertion,
    kind: Affine,
    linear: Linear,
    side: Literal["output", "input"],
    met: tuple[Insertion, ...],
) -> Decision:
    if kind.offset and linear.bias_name is None:
        if linear.weight_name not in reach.biases:
            kept = _kept(insertion, f"it adds a bias, and `{short_name(linear)}` has none")
            return replace(kept, lacks=linear.weight_name)
        linear = replace(linear, bias_name=reach.biases[linear.weight_name])
    blocked = reach.shared([linear], _alike(reach, insertion, side)) or (
        reach.shared_rows(insertion, linear) if side == "output" else ""
    )
    if blocked:
        return _kept(insertion, blocked, linear.node)
    return Decision(
        insertion, "merged", "", str(insertion.after), linear, side,
        unit="h" in kind.unit, reads_x="x" in kind.streams, offset=kind.offset, met=met,
    )  # fmt: skip


def _alike(reach: Reach, insertion: Insertion, side: Literal["output", "input"]) -> set[fx.Node]:
    """The nodes that read the weights of the linear layers which this delta and its twins are at."""
    find = reach.producer if side == "output" else reach.consumer
    paths = [find(entry) for entry in (insertion, *reach.twins(insertion))]
    return {node for path in paths if path is not None for node in readers_of(path.linear)}


def _same_value(a: fx.Node | None, b: object) -> bool:
    """Whether two nodes are one value up to casts and dropout, which a fold computes without."""
    return a is not None and _plain(a) is _plain(b)


def _plain(node: object) -> object:
    while isinstance(node, fx.Node) and is_call(node, aten.to.dtype, aten.dropout.default):
        node = node.args[0]
    return node


def _settle(reach: Reach, decision: Decision, of: Callable[[Insertion], Decision]) -> Decision:
    """The decision, or "kept" where another delta that stays is in the way."""
    if not decision.folds:
        return decision
    obstacle = _obstacle(reach, decision, of)
    return decision if obstacle is None else _kept(decision.insertion, *obstacle)


def _obstacle(reach: Reach, decision: Decision, of: Callable[[Insertion], Decision]) -> tuple[str, fx.Node] | None:
    insertion, ledger = decision.insertion, reach.program.ledger
    staying = _first_staying(reach.twins(insertion), of)
    if staying is not None:
        return staying
    if decision.side == "parameter":
        node = insertion.site.taps[insertion.tap].node
        earlier = [e for e in ledger[: ledger.index(insertion)] if e.site.taps[e.tap].node is node]
        return _first_staying(earlier, of)
    if decision.side == "input":
        for entry in decision.met:
            if not _follows(of(entry), decision.into):
                return f"delta `{entry.delta}`, which reads it, stays", entry.after
        return _first_staying(_on_weights(ledger, decision.into), of)
    additive = decision.unit or decision.widening is not None
    past = [entry for entry in decision.met if not (additive and _adds(entry))]
    if decision.widening is None:
        return _first_staying([*past, *_on_weights(ledger, decision.into)], of)
    inner = set(decision.widening.inner)
    read = next((c for c in reach.program.carried if any(n in inner for o in c.own for n in o.all_input_nodes)), None)
    if read is not None:
        return f"the carried value `{read.name}` reads the FFN's hidden units", read.node
    inside = [e for e in ledger if any(operand in inner for node in e.nodes for operand in node.all_input_nodes)]
    weights = [e for linear in insertion.site.linears.values() for e in _on_weights(ledger, linear)]
    return _first_staying([*past, *inside, *weights], of)


def _follows(other: Decision, linear: Linear | None) -> bool:
    """Whether a delta that reads the input of `linear` becomes a part of `linear` itself."""
    if linear is None or not other.folds:
        return False
    if other.widening is not None:
        return linear.node in {up.node for role, up in other.insertion.site.linears.items() if role != "down"}
    return other.into is not None and other.into.node is linear.node


def _first_staying(entries: list[Insertion], of: Callable[[Insertion], Decision]) -> tuple[str, fx.Node] | None:
    for entry in entries:
        if not of(entry).folds:
            return f"delta `{entry.delta}` at `{entry.tap}` is in the way and stays", entry.after
    return None


def _on_weights(ledger: list[Insertion], linear: Linear | None) -> list[Insertion]:
    """Entries that modify the weight or the bias of a linear layer."""
    if linear is None:
        return []
    own = (linear.weight, linear.bias)
    return [entry for entry in ledger if entry.site.taps[entry.tap].node in own]


def _uncast(node: object) -> object:
    while isinstance(node, fx.Node) and is_call(node, aten.to.dtype):
        node = node.args[0]
    return node


def _adds(entry: Insertion) -> bool:
    """Whether h' = h + something that does not read h: what is added to h before it may as well be added after."""
    after = _uncast(entry.after)
    if not isinstance(after, fx.Node) or not is_call(after, aten.add.Tensor) or after.kwargs:
        return False
    if _uncast(after.args[0]) is not entry.before:
        return False
    own, queue = {*entry.nodes, *entry.held}, [after.args[1]]  # a carried value may read h too
    while queue:
        node = queue.pop()
        if node is entry.before or node is entry.original:
            return False
        if isinstance(node, fx.Node) and node in own:
            queue.extend(node.all_input_nodes)
    return True
