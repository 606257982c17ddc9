"""`add`: the deltas of a directory as one more state of a model that is in memory.

Refused is what could not have been loaded on this base (another base, other tensors than the rule's), and deltas for
another model class or number of labels. A rule that the model runs already shares its plan and its traces.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from peftc.diagnostics import fail
from peftc.runtime.api import load_base, operate, refuse_other_base
from peftc.runtime.delta_dir import DeltaDir, check_names
from peftc.runtime.graph_model import Surgery
from peftc.runtime.quantized import refuse_trained
from peftc.runtime.states import BASE, Slot, State, States, located, parked_deltas, plant
from peftc.store.fingerprint import Fingerprint
from peftc.store.heads import resolve
from peftc.store.model_dir import ModelDir

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def add_state(model: Any, name: str, directory: str | Path) -> None:
    """Add the deltas at `directory` to the states of `model`, as `name`.

    Raises `PeftcError`: E034, E035, E040 as `load` does; E047, a name that is taken or none, or another head.
    """
    states: States = model._states
    _check_name(states, name)
    delta = DeltaDir.open(directory)
    first = next(iter(states.by_name.values())).surgery
    refuse_other_base(delta, Fingerprint.from_json(first.provenance["parts"]), first.provenance["path"])
    _check_head(delta, model, first, name)
    surgery = _surgery_of(delta, model, states, first)
    plan = surgery.plan
    refuse_trained(model, plan.trained, name)
    check_names(
        delta.path,
        delta.header.tensors,
        {name: parameter.shape for name, parameter in plan.parameters.items()},
        {name: tuple(model.get_parameter(name).shape) for name in plan.trained},
    )
    values = delta.tensors()
    absent = [trained for trained in plan.trained if trained not in values]
    if absent:
        values |= base_tensors(model, surgery, absent)
    for own in plan.parameters:
        plant(model, own, values[own].to(model.device), parked_deltas(name))
    owners, holders = located(model, plan.parameters, parked_deltas(name))
    trains = (*(own in plan.trainable for own in plan.parameters), *(True for _ in plan.trained))
    state = State(name, surgery, owners, holders, frozenset(plan.trained), trains)
    _open_slots(model, states, state, values)
    states.by_name[name] = state
    if len({other.trained for other in states.by_name.values()}) > 1:
        keep_base(model, states)


def keep_base(model: Any, states: States) -> None:
    """Have the base's own tensors at hand for every base parameter that a state has of its own; read where need be."""
    _open(model, states, states.active.trained)
    lost = [name for name, slot in states.slots.items() if not slot.holds(BASE)]
    if lost:
        first = next(iter(states.by_name.values()))  # a new head starts from the seed of the state that made the model
        for name, value in base_tensors(model, first.surgery, lost).items():
            states.slots[name].keep(BASE, _parameter(value, states.slots[name].tensor))
    states.whole = True


def _check_name(states: States, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BASE:
        reason = "it is what the base's own tensors are kept under" if name == BASE else "it names modules"
        fail("E047", f"a state cannot be called `{name}`: {reason}", help="use up to 64 letters, digits, `_` and `-`")
    if name in states.by_name:
        fail("E047", f"the model has a state `{name}` already", help="remove it first, or choose another name")


def _check_head(delta: DeltaDir, model: Any, first: Surgery, name: str) -> None:
    """The model class and the number of labels are those that the deltas were made for."""
    wanted, given = delta.manifest["base"], first.provenance
    if (wanted["head"], wanted["num_labels"]) == (given["head"], given["num_labels"]):
        return
    base = _base_of(first)
    cls, config = resolve(base.config, base.path, wanted["head"], wanted["num_labels"])
    theirs, ours = _described(cls, config), _described(first.base_class, model.config)
    if theirs != ours:
        fail("E047", f"`{name}` is a state of a {theirs}, and this is a {ours}", help="load it as a model of its own")


def _described(cls: type[Any], config: Any) -> str:
    labels = f" with {config.num_labels} labels" if "Classification" in cls.__name__ else ""
    return cls.__name__ + labels


def _base_of(surgery: Surgery) -> ModelDir:
    base = ModelDir.open(surgery.base_dir or surgery.provenance["path"])
    base.require_weights()
    return base


def _surgery_of(delta: DeltaDir, model: Any, states: States, first: Surgery) -> Surgery:
    """What to know of the new state: shared with a state of the same rule, or traced and planned."""
    recorded = delta.manifest["base"]
    provenance = {**first.provenance, **{key: recorded[key] for key in ("head", "num_labels", "seed")}}
    for state in states.by_name.values():
        if state.surgery.rule.text == delta.rule.text:
            return replace(state.surgery, provenance=provenance)
    surgery = operate(model, first.base_class, delta.rule, provenance, _base_of(first))
    first.skeletons.update(surgery.skeletons)
    return replace(surgery, skeletons=first.skeletons, layouts=first.layouts)


def base_tensors(model: Any, surgery: Surgery, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters as they were before any training: the base's, and those of a new head as its seed makes them.

    The base is read again, in the dtype that the model was loaded in. Raises `PeftcError` E030, E031, E035.
    """
    base, given = _base_of(surgery), surgery.provenance
    recorded = Fingerprint.from_json(given["parts"]).differences(base.fingerprint_parts())
    if recorded:
        message = f"{base.path} is no longer the base that this model was loaded from: they differ in {recorded[0]}"
        fail("E035", message, help="put the base back, to read from it what the deltas have replaced")
    dtype = next(iter(surgery.skeletons))[0]
    fresh, _ = load_base(base, given["head"], given["num_labels"], given["seed"], dtype)
    return {name: fresh.get_parameter(name).detach().clone() for name in names}


def _parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(device=like.device, dtype=like.dtype), requires_grad=False)


def _open_slots(model: nn.Module, states: States, state: State, values: Mapping[str, torch.Tensor]) -> None:
    """Slots for the base parameters that `state` or the active one has of its own; `state` keeps `values` in its."""
    _open(model, states, states.active.trained | state.trained)
    for name in (name for name in states.slots if name in state.trained):
        slot = states.slots[name]
        slot.keep(state.name, _parameter(values[name], slot.tensor))


def _open(model: nn.Module, states: States, names: Collection[str]) -> None:
    missing = [name for name in names if name not in states.slots]
    if not missing:
        return
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    for name in sorted(missing):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        found = places[id(model.get_parameter(name))]
        found.sort(key=lambda place: place != (owner, leaf))
        occupant = states.active.name if name in states.active.trained else BASE
        states.slots[name] = Slot(tuple(found), occupant)
