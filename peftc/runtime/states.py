"""States: several sets of deltas on one base, of which one is active.

    model = peftc.load("out-en")            # its state is called "default"
    model.add("de", "out-de")
    model.set_active("de")                  # trains and answers as the model that peftc.load("out-de") gives
    with model.disable():
        ...                                 # the base alone

Invariant: the tensors of the active state stand under the names that a model with no other state has; those of the
others wait beside them, under `...peftc_NAME` and, for base tensors that a rule trains, `...peftc_base.NAME`. So
whatever reads a model by name (the graph, a save, a resumed run) needs to know of the active state alone, and a switch
moves modules, never data. States of one rule run the same traces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftc.diagnostics import did_you_mean, fail

if TYPE_CHECKING:
    from peftc.runtime.graph_model import Surgery
    from peftc.runtime.mixing import JointSurgery, Mixture

DEFAULT = "default"
BASE = "base"
"""What the base's own tensors wait under, which is why no state has this name."""

Rows = tuple["str | None", ...]
"""For each row of a batch the name of its state, None for the base."""

_DELTAS = "peftc"
_TRAINED = "peftc_base"


@dataclass(slots=True)
class State:
    """One set of deltas: what peftc knows of it, and the modules that hold it."""

    name: str
    surgery: Surgery
    owners: tuple[nn.Module, ...]
    """The modules that have its deltas under `peftc`, or under `peftc_NAME` while another is active."""
    holders: tuple[tuple[nn.Module, str], ...]
    """Where each delta parameter is: the innermost module, and the name there."""
    trained: frozenset[str]
    """The base parameters that it has of its own."""
    trains: tuple[bool, ...] = ()
    """Which of its parameters require a gradient, kept while another state is active."""

    def parked(self, name: str) -> str:
        """The name of one of its delta parameters while another state is active."""
        parts = name.split(".")
        parts[parts.index(_DELTAS)] = parked_deltas(self.name)
        return ".".join(parts)

    def boxed(self, name: str) -> str:
        """The name of one of the base parameters that it has of its own while another's stands in its place."""
        path, _, leaf = name.rpartition(".")
        return ".".join(part for part in (path, _TRAINED, self.name, leaf) if part)


def parked_deltas(state: str) -> str:
    return f"{_DELTAS}_{state}"


@dataclass(slots=True)
class Slot:
    """A base parameter that states have of their own: its places (several where it is tied), and whose stands there."""

    places: tuple[tuple[nn.Module, str], ...]
    occupant: str = BASE

    @property
    def tensor(self) -> nn.Parameter:
        module, leaf = self.places[0]
        return module._parameters[leaf]  # pyright: ignore[reportReturnType]

    def box(self, state: str) -> nn.Module:
        """The module that keeps the parameter of one state while another's stands in the slot."""
        module: Any = self.places[0][0]
        for part in (_TRAINED, state):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        return module

    def holds(self, state: str) -> bool:
        return self.occupant == state or self.places[0][1] in self.box(state)._parameters

    def keep(self, state: str, parameter: nn.Parameter) -> None:
        self.box(state)._parameters[self.places[0][1]] = parameter

    def drop(self, state: str) -> None:
        """Forget the parameter of a state that is not in the slot."""
        module = self.places[0][0]
        held = module._modules.get(_TRAINED)
        if held is not None and state in held._modules:
            box = self.box(state)
            box._parameters.pop(self.places[0][1], None)
            if not box._parameters:
                del held._modules[state]

    def seat(self, state: str) -> None:
        """Put the parameter of `state` into the slot, and the one that is there into its box."""
        if self.occupant != state:
            parameter = self.box(state)._parameters.pop(self.places[0][1])
            self.keep(self.occupant, self.tensor)
            for module, leaf in self.places:
                module._parameters[leaf] = parameter
            self.occupant = state

    def of(self, state: str) -> nn.Parameter:
        """The parameter of `state`, wherever it is."""
        if self.occupant == state:
            return self.tensor
        return self.box(state)._parameters[self.places[0][1]]  # pyright: ignore[reportReturnType]

    def name(self, name: str, state: str) -> str:
        """The name under which the parameter of `state` is now; `name` is that of the slot."""
        path, _, leaf = name.rpartition(".")
        return name if self.occupant == state else ".".join(p for p in (path, _TRAINED, state, leaf) if p)


@dataclass(slots=True)
class States:
    """The states of one model, and where their tensors are now."""

    by_name: dict[str, State]
    active: State
    slots: dict[str, Slot] = field(default_factory=dict)
    whole: bool = False
    """Whether every slot holds the base's own tensor: only then may it be asked for."""
    bare: bool = False
    """Whether the base's own tensors stand in the slots: inside `disable()`."""
    rows: Rows | None = None
    """The states of the rows of a batch: inside `per_sample()`."""
    mixed: Mixture | None = None
    """What answers inside `mix()`."""
    joint: dict[tuple[str, ...], JointSurgery] = field(default_factory=dict)
    """The graphs of several states together, by their names."""

    def get(self, name: str) -> State:
        """The state of this name. Raises `PeftcError` E047."""
        if name not in self.by_name:
            fail("E047", f"the model has no state `{name}`", help=did_you_mean(str(name), self.by_name))
        return self.by_name[name]

    def seat(self, state: State) -> None:
        """Move the tensors of `state` under the names that the graph reads, and those of the active one away."""
        if state is not self.active:
            away, here = parked_deltas(self.active.name), parked_deltas(state.name)
            for owner in self.active.owners:
                owner._modules[away] = owner._modules.pop(_DELTAS)
            for owner in state.owners:
                owner._modules[_DELTAS] = owner._modules.pop(here)
            self.active = state
        for name, slot in self.slots.items():
            slot.seat(state.name if name in state.trained else BASE)
        self.bare = False

    def bare_slots(self) -> None:
        """Move the base's own tensors into the slots."""
        for slot in self.slots.values():
            slot.seat(BASE)
        self.bare = True

    def place(self, state: State, name: str) -> str:
        """The name under which a tensor of the model that has `state` active is now."""
        if name in self.slots:
            return self.slots[name].name(name, state.name if name in state.trained else BASE)
        if state is not self.active and _DELTAS in name.split("."):
            return state.parked(name)
        return name

    def parameters(self, state: State) -> Iterator[nn.Parameter]:
        """The parameters that are the state's own."""
        for module, leaf in state.holders:
            yield module._parameters[leaf]  # pyright: ignore[reportReturnType]
        for name in self.slots:
            if name in state.trained:
                yield self.slots[name].of(state.name)

    def train(self, state: State, before: State) -> None:
        """Let the parameters of `state` train as they did when it was last active, and none of `before`."""
        before.trains = tuple(parameter.requires_grad for parameter in self.parameters(before))
        for parameter in self.parameters(before):
            parameter.requires_grad = False
        for parameter, trains in zip(self.parameters(state), state.trains, strict=True):
            parameter.requires_grad = trains

    @contextlib.contextmanager
    def training(self, names: Collection[str]) -> Iterator[None]:
        """Inside, states that are not active train too, each as when it was last active."""
        waiting = [self.by_name[name] for name in names if self.by_name[name] is not self.active]
        for state in waiting:
            for parameter, trains in zip(self.parameters(state), state.trains, strict=True):
                parameter.requires_grad = trains
        try:
            yield
        finally:
            for state in waiting:
                state.trains = tuple(parameter.requires_grad for parameter in self.parameters(state))
                for parameter in self.parameters(state):
                    parameter.requires_grad = False

    def forget(self, state: State) -> None:
        """Drop a state that is not active, and its tensors."""
        for owner in state.owners:
            del owner._modules[parked_deltas(state.name)]
        for slot in self.slots.values():
            slot.drop(state.name)
        del self.by_name[state.name]
        self.joint = {names: surgery for names, surgery in self.joint.items() if state.name not in names}

    @contextlib.contextmanager
    def shown(self, model: Any, state: State | None) -> Iterator[None]:
        """Inside, the graph reads the tensors of `state`, or (None) the base runs; what trains stays as it is."""
        before, bare, surgery = self.active, self.bare, model._surgery
        rows, mixed, self.rows, self.mixed = self.rows, self.mixed, None, None
        try:
            if state is None:
                self.bare_slots()
            else:
                self.seat(state)
                model._surgery = state.surgery
            yield
        finally:
            self.seat(before)
            model._surgery, self.rows, self.mixed = surgery, rows, mixed
            if bare:
                self.bare_slots()


def plant(model: nn.Module, name: str, value: torch.Tensor, container: str = _DELTAS) -> None:
    """Register a delta parameter, frozen, under the module that owns its site: in `container` in place of the usual."""
    parts = name.split(".")
    split = parts.index(_DELTAS)
    module = model.get_submodule(".".join(parts[:split]))
    for part in (container, *parts[split + 1 : -1]):
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(parts[-1], nn.Parameter(value, requires_grad=False))


def first_state(model: nn.Module, surgery: Surgery) -> States:
    """The states of a model that has just been adapted: one, and active."""
    plan = surgery.plan
    state = State(DEFAULT, surgery, *located(model, plan.parameters, _DELTAS), frozenset(plan.trained))
    return States({state.name: state}, state)


def located(
    model: nn.Module, names: Any, container: str
) -> tuple[tuple[nn.Module, ...], tuple[tuple[nn.Module, str], ...]]:
    """The owners and the holders of delta parameters whose containers are called `container`."""
    owners: dict[int, nn.Module] = {}
    holders: list[tuple[nn.Module, str]] = []
    for name in names:
        parts = name.split(".")
        split = parts.index(_DELTAS)
        owner = model.get_submodule(".".join(parts[:split]))
        owners[id(owner)] = owner
        holders.append((owner.get_submodule(".".join((container, *parts[split + 1 : -1]))), parts[-1]))
    return tuple(owners.values()), tuple(holders)
