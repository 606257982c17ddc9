"""Mixing: several states answer together, each with a weight; `peftc.passes.mix` says what is mixed.

    with model.mix({"de": 0.7, "fr": 0.3}):
        model(**batch)

A graph with the deltas of all these states is traced and kept; it reads them wherever they are, under the names that
they have while another state is active. The weights are read in each call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from peftc.diagnostics import fail
from peftc.passes.freeze import Freeze
from peftc.passes.mix import WEIGHTS, Mix
from peftc.pipeline import run
from peftc.planning.agreement import check_same
from peftc.planning.plan import Plan, make_plan
from peftc.runtime.graph_model import Surgery
from peftc.runtime.states import State, States

if TYPE_CHECKING:
    from peftc.ir.program import Program


@dataclass(slots=True)
class JointSurgery(Surgery):
    """What peftc knows of a model that has the deltas of several states in one graph."""

    members: dict[str, State] = field(default_factory=dict)

    def rewrite(self, program: Program, dtypes: Mapping[str, torch.dtype]) -> None:
        """Plan the rule of each state on the program, then insert them together."""
        plans: dict[str, Plan] = {}
        for name, state in self.members.items():
            own = state.surgery.plan
            kinds = {key: dtypes[state.parked(key)] for key in own.parameters}
            plan = make_plan(own.rule, program, dtypes=kinds, fresh=own.trained, like=own)
            check_same(own, plan)
            plans[name] = _parked(plan, state)
        trained = {name: {key: state.boxed(key) for key in state.trained} for name, state in self.members.items()}
        steps: list[Any] = [Mix(plans, trained), Freeze(self.plan)]
        run(program, steps)


@dataclass(frozen=True, slots=True)
class Mixture:
    """States with their weights, and the graph that they share with other weights of the same states."""

    surgery: JointSurgery
    weights: dict[str, torch.Tensor]
    homes: dict[str, tuple[State, str]]
    """The graph's names of what states have of their own: the state, and the name while it is active."""

    def tensor(self, states: States, name: str) -> torch.Tensor | str:
        """What the graph asks for by `name`: a weight, or the name under which the model has it now."""
        owner, _, leaf = name.partition(".")
        if owner == WEIGHTS:
            return self.weights[leaf]
        if name in self.homes:
            return states.place(*self.homes[name])
        return states.slots[name].name(name, "base") if name in states.slots else name


def mixture(states: States, given: Mapping[str, float]) -> Mixture:
    """Check what `mix` is given, and find or make the graph. Raises `PeftcError` E047, E048."""
    if not isinstance(given, Mapping) or not given:
        fail("E048", "`mix` takes a weight for each state", help='`{"de": 0.7, "fr": 0.3}`')
    members = {name: states.get(name) for name in sorted(given)}
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            fail("E048", f"the weight of `{name}` is no finite number", help="give a number")
    key = tuple(members)
    if key not in states.joint:
        states.joint[key] = _joined(members)
    weights = {name: torch.tensor(float(given[name]), dtype=torch.float64) for name in members}
    homes = {state.parked(own): (state, own) for state in members.values() for own in state.surgery.plan.parameters}
    homes |= {state.boxed(own): (state, own) for state in members.values() for own in state.trained}
    return Mixture(states.joint[key], weights, homes)


def _joined(members: Mapping[str, State]) -> JointSurgery:
    first = next(iter(members.values())).surgery
    edits = [edit for state in members.values() for edit in _parked(state.surgery.plan, state).edits]
    plan = Plan(first.plan.rule, tuple(edits), (), first.plan.base_sizes)
    return JointSurgery(
        first.rule,
        plan,
        first.base_class,
        first.provenance,
        first.base_dir,
        skeletons=first.skeletons,
        layouts=first.layouts,
        members=dict(members),
    )


def _parked(plan: Plan, state: State) -> Plan:
    """The plan with its parameters under the names that they have while another state is active."""
    edits: list[Any] = []
    for edit in plan.edits:
        own = {key: None if p is None else replace(p, name=state.parked(p.name)) for key, p in edit.parameters.items()}
        edits.append(replace(edit, parameters=own))
    return replace(plan, edits=tuple(edits))
