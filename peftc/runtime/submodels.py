"""Submodels: the models inside a model (a head's backbone, an encoder), called by themselves.

Code that computes its own loss calls the backbone and the head apart: TRL does, to spare the logits. The graph of the
whole model is of no use there, and the module's own forward knows no delta. So such a call is traced as well, by the
names of the whole model, and rewritten by the same rule.

Invariant: the edits inside the submodel are those of the whole model's plan, all of them, with parameters of the same
names; what a rule does outside of it (at the language model's head, say) is no part of the call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from peftc.diagnostics import fail
from peftc.frontend.trace import InputSpec, build_skeleton
from peftc.patterns.sites import find
from peftc.pipeline import analyse, rewrite
from peftc.planning.agreement import sites_like
from peftc.planning.select import selected
from peftc.runtime import per_sample
from peftc.runtime.lengths import fitting
from peftc.runtime.signature import call_key, call_specs, read_call
from peftc.runtime.state import state_of
from peftc.runtime.units import gathered_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftc.ir.program import Program
    from peftc.lang.rule import Rule
    from peftc.planning.plan import Edit, Plan


@dataclass(frozen=True)
class Place:
    """Where a submodel is: `path` in `root`, and the class whose forward it stands for."""

    root: Any
    path: str
    own: type[PreTrainedModel]


def adopt(root: Any) -> None:
    """Make each model inside `root`, called by itself, run with its deltas."""
    from transformers import PreTrainedModel

    for path, module in root.named_modules():
        if path and isinstance(module, PreTrainedModel):
            module.__dict__["_peftc_place"] = Place(root, path, type(module))  # not registered: that were a cycle
            module.__class__ = _calling(type(module))


@functools.cache
def _calling(own: type[PreTrainedModel]) -> type[Any]:
    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = self.__dict__["_peftc_place"]
        if place.root.active is None:
            return own.forward(self, *args, **kwargs)
        if place.root._states.rows is not None:
            return per_sample.answer(place.root, self.forward, own, self.config, args, kwargs)
        return _run(place, args, kwargs)

    return type("Peftc" + own.__name__, (own,), {"forward": forward, "__module__": __name__})


@functools.cache
def _traced(base: type[PreTrainedModel], path: str, own: type[PreTrainedModel]) -> type[Any]:
    """The class of a whole model whose forward calls only the module at `path`: parameters keep their names."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(path)(*args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": __name__})


def _run(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    root = place.root
    if root._states.mixed is not None:
        fail("E048", f"inside mix() `{place.path}` is not called by itself", help="call the whole model")
    call = read_call(place.own.forward, root.get_submodule(place.path).config, args, kwargs)
    if call.cached or call.encoded is not None:
        what = "a cache" if call.cached else "`encoder_outputs`"
        fail("E041", f"`{place.path}` called by itself takes no {what}", help="leave it out, or call the whole model")
    executor = root.executor_of(_program(place, call.tensors, call.flags), place.path)
    result = executor(state_of(root), call.tensors, root.get_submodule)
    return result.to_tuple() if call.as_tuple else result


def _program(place: Place, inputs: Mapping[str, torch.Tensor], flags: Mapping[str, Any]) -> Program:
    root, surgery = place.root, place.root.surgery
    specs = call_specs(inputs, root)
    one = gathered_dtype(root)
    now = {name: one or root.get_parameter(name).dtype for name in surgery.plan.parameters}
    kinds = tuple(now[name] for name in surgery.plan.one_of_each_dtype)

    def traced(specs: Mapping[str, InputSpec]) -> Program:
        key = (place.path, root.variant(), kinds, call_key(specs, flags))
        if key not in surgery.programs:
            surgery.programs[key] = _rewritten(place, specs, flags, now)
        return surgery.programs[key]

    return fitting(traced, specs, inputs, place.own.__name__)


def _rewritten(
    place: Place, specs: Mapping[str, InputSpec], flags: Mapping[str, Any], now: Mapping[str, torch.dtype]
) -> Program:
    root, surgery = place.root, place.root.surgery
    cls = _traced(surgery.base_class, place.path, place.own)
    program = analyse(build_skeleton(cls, copy.deepcopy(root.config), root.variant()[0]), specs, flags)
    rule = _narrowed(surgery.rule, program, surgery.plan)
    plan = rewrite(program, rule, dtypes=now, fresh=surgery.plan.trained, like=surgery.plan)
    refuse_other(place, surgery.plan, plan)
    return program


def _narrowed(rule: Rule, program: Program, whole: Plan) -> Rule:
    """The rule without the rows that reach nothing here; counts that a row expects are of the whole model."""
    located = sites_like(whole.sites, (*program.sites, *find(program, rule.patterns.values()).sites))
    rows = [replace(row, expect=None) for row in rule.deltas if selected(row, rule, located)]
    return replace(rule, deltas=tuple(rows))


def refuse_other(place: Place, whole: Plan, part: Plan) -> None:
    """Raise E041 unless the submodel has the edits that the whole model has inside it, and no others.

    An edit of the model as a whole counts as inside.
    """
    known = {name: parameter.shape for name, parameter in whole.parameters.items()}
    inside = {_key(edit) for edit in whole.edits if _lies_in(edit.site.path, place.path)}
    wrong = [name for name, parameter in part.parameters.items() if known.get(name) != parameter.shape]
    wrong += [" of ".join(reversed(key)) for key in sorted(inside ^ {_key(edit) for edit in part.edits})]
    if wrong:
        fail(
            "E041",
            f"`{place.path}` cannot be called by itself: the rule does something else there than in the whole model, "
            f"to {wrong[0]}",
            help="call the whole model",
        )


def _key(edit: Edit) -> tuple[str, str, str]:
    return edit.site.path or "the model", edit.tap, f"`{edit.delta.name}`"


def _lies_in(path: str, outer: str) -> bool:
    return path in ("", outer) or path.startswith(outer + ".")
