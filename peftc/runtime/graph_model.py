"""`GraphModel`: a Hugging Face model whose forward is the rewritten graph.

`attach` turns a loaded model into an instance of a dynamic subclass of its own class: the module tree and the
state-dict names stay, deltas join as parameters under the modules that own their sites, and `forward` runs the
graph. So `isinstance`, `Trainer`, `.to()` and `state_dict` see a normal model. A call with inputs that have not been
seen is traced then; `train()` and `eval()` choose between two graphs of one trace.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from peftc.diagnostics import fail
from peftc.frontend.trace import LABELS, InputSpec, Skeleton, build_skeleton
from peftc.ir.program import Program
from peftc.ir.stepwise import across
from peftc.pipeline import analyse, rewrite
from peftc.planning.agreement import check_same
from peftc.planning.counts import Counts, counts_of
from peftc.planning.plan import Plan
from peftc.runtime.dropouts import places, rates_of
from peftc.runtime.executor import Executor
from peftc.runtime.generation import Generates, preparing, refuse_cache
from peftc.runtime.hierarchy import called
from peftc.runtime.lengths import fitting, one_past
from peftc.runtime.quantized import forms_of
from peftc.runtime.signature import call_key, call_specs, read_call
from peftc.runtime.state import state_of
from peftc.runtime.stateful import HoldsStates
from peftc.runtime.states import first_state, plant
from peftc.runtime.submodels import adopt
from peftc.runtime.units import gathered_dtype, mark_layers, paths_of, units_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftc.frontend.cache import CacheLayout
    from peftc.lang.rule import Rule

_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


@dataclass(slots=True)
class Surgery:
    """What peftc knows about an adapted model: the rule, its plan, where the base came from, and its traces."""

    rule: Rule
    plan: Plan
    base_class: type[PreTrainedModel]
    provenance: dict[str, Any] = field(default_factory=dict)
    """What `save_pretrained` writes about the base: reference, fingerprint, head, labels."""
    base_dir: Path | None = None
    executors: dict[Any, Executor] = field(default_factory=dict)
    programs: dict[Any, Program] = field(default_factory=dict)
    skeletons: dict[Any, Skeleton] = field(default_factory=dict)
    layouts: dict[Any, CacheLayout] = field(default_factory=dict)
    """What the model's cache holds, where it has been asked for."""
    cuts: dict[Any, Program] = field(default_factory=dict)
    """Parts of the programs, by what they were cut from."""
    dropouts: dict[int, dict[str, str]] = field(default_factory=dict)
    """Nodes of a program that drop at the rate of a module, with the module's path."""
    uncached: dict[Any, str | None] = field(default_factory=dict)
    """Why the model generates without a cache; None where it does with one."""

    def keep(self, model: Any, inputs: Mapping[str, InputSpec], skeleton: Skeleton, program: Program) -> None:
        """Keep a trace of `model` for its first call with `inputs`."""
        self.skeletons[_variant(model)] = skeleton
        planned = tuple(self.plan.parameters[name].dtype for name in self.plan.one_of_each_dtype)
        self.programs[_variant(model), planned, call_key(inputs, {})] = program

    def rewrite(self, program: Program, dtypes: Mapping[str, torch.dtype]) -> None:
        """Rewrite a program of the model, whose delta parameters have these dtypes now, as the first one was."""
        plan = rewrite(program, self.rule, dtypes=dtypes, fresh=self.plan.trained, like=self.plan)
        check_same(self.plan, plan)

    def __deepcopy__(self, memo: dict[int, Any]) -> Surgery:
        own = {name: dict(getattr(self, name)) for name in ("programs", "skeletons", "layouts", "cuts", "uncached")}
        return replace(self, executors={}, **own)


class GraphModel(HoldsStates, Generates):
    """Mixed in before the model's own class; see the module docstring."""

    _surgery: Surgery
    supports_gradient_checkpointing = True

    def _get_name(self) -> str:
        """The base's name: the Trainer looks it up to know whether a label is its token's or the next one's."""
        return self._surgery.base_class.__name__

    @property
    def surgery(self) -> Surgery:
        """The rule, plan and traces of this model."""
        return self._surgery

    def program_for(self, inputs: Mapping[str, torch.Tensor], flags: Mapping[str, Any] | None = None) -> Program:
        """The rewritten program that serves a call with these tensors (traced on first use)."""
        return self.program_of(call_specs(inputs, self), flags or {}, tensors=inputs)

    def program_of(
        self,
        specs: Mapping[str, InputSpec],
        flags: Mapping[str, Any],
        layout: CacheLayout | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> Program:
        """The rewritten program for inputs of these kinds, of which some are a cache of this layout.

        With `tensors` it is one that holds for their sizes: where a trace holds for one length only, one of theirs.
        """
        return fitting(lambda kinds: self._program_of(kinds, flags, layout), specs, tensors or {}, type(self).__name__)

    def _program_of(
        self, specs: Mapping[str, InputSpec], flags: Mapping[str, Any], layout: CacheLayout | None
    ) -> Program:
        surgery = self._surgery
        model: Any = self
        key = (self.variant(), _kinds(model, surgery.plan), call_key(specs, flags))
        if key not in surgery.programs:
            surgery.programs[key] = model._trace(specs, flags, layout)
        return surgery.programs[key]

    @torch.compiler.disable
    def _trace(self, specs: Mapping[str, InputSpec], flags: Mapping[str, Any], layout: CacheLayout | None) -> Program:
        """Not compiled: torch.compile breaks its graph here at the first call of a kind, and no more."""
        surgery = self._surgery
        model: Any = self
        program = analyse(self.skeleton(), specs, flags, layout)
        one = gathered_dtype(model)
        state = state_of(model)
        surgery.rewrite(program, {name: one or state[name].dtype for name in surgery.plan.parameters})
        if layout is not None and (reason := across(program) or one_past(program)) is not None:
            refuse_cache(type(self).__name__, reason)
        return program

    def variant(self) -> tuple[Any, ...]:
        """What of the model, beside the inputs of a call, a trace of it depends on."""
        return _variant(self)

    def skeleton(self) -> Skeleton:
        """The model without weights, as it is traced."""
        model: Any = self
        skeletons, variant = self._surgery.skeletons, self.variant()
        if variant not in skeletons:
            skeletons[variant] = build_skeleton(self._surgery.base_class, copy.deepcopy(model.config), variant[0])
        skeleton = skeletons[variant]
        if hasattr(skeleton.config, "problem_type"):
            skeleton.config.problem_type = model.config.problem_type
        return skeleton

    def executor_of(self, program: Program, inside: str = "") -> Executor:
        """The program as a callable, for the device and the mode that the model is in.

        Of a program that is the call of the module at `inside`, neither that module nor one around it is called.
        """
        model: Any = self
        units = tuple(unit for unit in units_of(model) if not (inside + ".").startswith(unit + "."))
        rates = self._dropout_rates(program) if model.training else {}
        key = (id(program), model.training, model.device, units, tuple(rates.values()))
        if key not in self._surgery.executors:
            called = paths_of(model, units)
            self._surgery.executors[key] = Executor(
                program, training=model.training, device=model.device, units=called, quantized=forms_of(model),
                rates=rates,
            )  # fmt: skip
        return self._surgery.executors[key]

    def _dropout_rates(self, program: Program) -> dict[str, float]:
        """What each node of the program that drops for a module drops now."""
        model: Any = self
        found = self._surgery.dropouts
        if id(program) not in found:
            look: Any = places  # the decorator hides the signature
            found[id(program)] = look(program.graph, model.get_submodule)
        return rates_of(found[id(program)], model.get_submodule)

    def execute(self, program: Program, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Run a program of this model on tensors by the names of its inputs; the model's own output class."""
        executor, given = self.executor_of(program), dict(tensors)
        if LABELS in executor.inputs:
            given[LABELS] = given.pop("labels")
        model: Any = self
        return executor(state_of(model), given, model.get_submodule)

    def run_flat(self, program: Program, tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """As `execute`, but what the graph returns, as it does."""
        model: Any = self
        return self.executor_of(program).in_parts(state_of(model), tensors, model.get_submodule)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph, whose deltas are the active state's."""
        model: Any = self
        call = read_call(self._surgery.base_class.forward, model.config, args, kwargs)
        if call.cached or call.encoded is not None:
            from peftc.runtime.cached import answer

            return answer(self, call)
        result = self.execute(self.program_for(call.tensors, call.flags), call.tensors)
        return result.to_tuple() if call.as_tuple else result

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        state: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the delta directory of the active state, or of `state`: rule, deltas and trained base tensors, never
        the base weights.

        `state_dict` gives the values in place of the model's own, as in transformers' method; its other arguments
        are accepted and have no meaning here. Files that are there and not peftc's stay. A sharded model (FSDP2) is
        gathered: call this on every process, with `is_main_process` on one. Raises `PeftcError` E036, E040, E041, E047.
        """
        from peftc.runtime.save import save_model, values_to_save

        if push_to_hub:
            fail("E041", "peftc uploads nothing", help="upload the saved directory with `hf upload`")
        with self.saved_state(state):
            values = values_to_save(self, state_dict)
            if is_main_process:
                save_model(self, Path(save_directory), values)

    def save_dequantized(self, base: str | Path, deltas: str | Path) -> None:
        """Of a model on a quantized base, write the rounded weights as a plain checkpoint at `base` and the active
        state's deltas at `deltas`, made on that checkpoint: they merge and load without any rounding.

        Raises `PeftcError` E055 where nothing is quantized, E036 for a place that cannot be used.
        """
        from peftc.runtime.quantized import save_dequantized

        save_dequantized(self, Path(base), Path(deltas))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A model with parameters of its own; traces, which hold none, are shared."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in self.__dict__.items())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        fail(
            "E041",
            f"a {type(self).__name__} cannot be pickled: its class is made at run time",
            help="use save_pretrained and peftc.load, or pickle its state_dict()",
        )

    def parameter_counts(self) -> Counts:
        """What the active state trains, what it stores, and its size by the paper's convention."""
        surgery = self._surgery
        return counts_of(surgery.plan, next(iter(surgery.programs.values())))

    def print_trainable_parameters(self) -> None:
        """Print trained and total counts in the line that PEFT prints, then the other ways of counting."""
        model: Any = self
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
        print(self.parameter_counts().describe())

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = _CHECKPOINT, every_n_layers: int = 1
    ) -> None:
        """What transformers' `activation_checkpointing_enable` and its likes call: mark the layers to compute again."""
        programs = self._surgery.programs.values()
        blocks = dict.fromkeys(site.path for program in programs for site in program.sites if site.kind == "block")
        paths = {path: None for program in programs for path in called(program.graph)}
        model: Any = self
        mark_layers(model, blocks, paths, gradient_checkpointing_func, every_n_layers if enable else 0)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        fail(
            "E041",
            "the embeddings of an adapted model have the size of its base's",
            help="resize the base model, save it, and apply the rule to that",
        )


def _variant(model: Any) -> tuple[Any, ...]:
    """What of a model, beside the inputs of a call, its trace depends on."""
    return gathered_dtype(model) or model.dtype, model.config._attn_implementation


def _kinds(model: Any, plan: Plan) -> tuple[torch.dtype, ...]:
    """The dtypes that the deltas have now (a user may have converted the model), one of each that the plan has."""
    one, state = gathered_dtype(model), state_of(model)
    return tuple(one or state[name].dtype for name in plan.one_of_each_dtype)


@functools.cache
def _subclass(base: type[PreTrainedModel]) -> type[Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._answer(args, kwargs)

    return type(
        "Peftc" + base.__name__, (GraphModel, base), {"forward": forward, "__module__": __name__, **preparing(base)}
    )


def attach(model: PreTrainedModel, surgery: Surgery, values: Mapping[str, torch.Tensor]) -> Any:
    """Turn `model` into a `GraphModel`: register the deltas with `values`, freeze all else but what the rule trains."""
    for name in surgery.plan.parameters:
        plant(model, name, values[name].to(device=model.device))
    model.requires_grad_(False)
    for name in surgery.plan.trainable:
        model.get_parameter(name).requires_grad_(True)
    model.__class__ = _subclass(surgery.base_class)
    model._surgery = surgery  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    model._states = first_state(model, surgery)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    adopt(model)
    return model
