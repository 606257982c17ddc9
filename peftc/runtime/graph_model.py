"""`GraphModel`: a Hugging Face model whose forward is the rewritten graph.

`attach` turns a loaded model into an instance of a dynamic subclass of its own class: the module tree and the
state-dict names stay, deltas join as parameters under the modules that own their sites, and `forward` runs the
graph. So `isinstance`, `Trainer`, `.to()` and `state_dict` see a normal model. A call with inputs that have not been
seen is traced then; `train()` and `eval()` choose between two graphs of one trace.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.diagnostics import fail
from peftc.frontend.trace import LABELS, Skeleton, build_skeleton
from peftc.ir.program import Program
from peftc.pipeline import analyse, rewrite
from peftc.plan import Plan
from peftc.runtime.executor import Executor
from peftc.runtime.signature import call_key, input_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftc.lang.rule import Rule

_CACHES = ("past_key_values", "cache_params", "encoder_outputs")


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
    skeletons: dict[torch.dtype, Skeleton] = field(default_factory=dict)


class GraphModel:
    """Mixed in before the model's own class; see the module docstring."""

    _surgery: Surgery

    @property
    def surgery(self) -> Surgery:
        """The rule, plan and traces of this model."""
        return self._surgery

    def program_for(self, inputs: Mapping[str, torch.Tensor], flags: Mapping[str, Any] | None = None) -> Program:
        """The rewritten program that serves a call with these tensors (traced on first use)."""
        surgery, flags = self._surgery, dict(flags or {})
        model: Any = self
        seq2seq = bool(model.config.is_encoder_decoder)
        specs = {name: input_spec(name, tensor, encoder_decoder=seq2seq) for name, tensor in inputs.items()}
        key = (model.dtype, _delta_dtype(model), call_key(specs, flags))
        if key not in surgery.programs:
            program = analyse(self._skeleton(model.dtype), specs, flags)
            rewrite(program, surgery.rule, dtype=_delta_dtype(model), fresh=surgery.plan.trained)
            surgery.programs[key] = program
        return surgery.programs[key]

    def _skeleton(self, dtype: torch.dtype) -> Skeleton:
        surgery, model = self._surgery, self
        if dtype not in surgery.skeletons:
            config = copy.deepcopy(model.config)  # pyright: ignore[reportAttributeAccessIssue]
            surgery.skeletons[dtype] = build_skeleton(surgery.base_class, config, dtype)
        skeleton = surgery.skeletons[dtype]
        if hasattr(skeleton.config, "problem_type"):
            skeleton.config.problem_type = model.config.problem_type  # pyright: ignore[reportAttributeAccessIssue]
        return skeleton

    def _executor(self, inputs: Mapping[str, torch.Tensor], flags: Mapping[str, Any]) -> Executor:
        model: Any = self
        program = self.program_for(inputs, flags)
        key = (id(program), model.training, model.device)
        if key not in self._surgery.executors:
            self._surgery.executors[key] = Executor(program, training=model.training, device=model.device)
        return self._surgery.executors[key]

    def _run(self, arguments: dict[str, Any]) -> Any:
        arguments = {name: value for name, value in arguments.items() if value is not None}
        as_tuple = arguments.pop("return_dict", True) is False
        _refuse_caches(arguments)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        flags = {name: value for name, value in arguments.items() if name not in tensors}
        if isinstance(flags.get("num_items_in_batch"), int):
            tensors["num_items_in_batch"] = torch.tensor(flags.pop("num_items_in_batch"))
        flags.pop("use_cache", None)
        executor = self._executor(tensors, flags)
        if LABELS in executor.inputs:
            tensors[LABELS] = tensors.pop("labels")
        result = executor(state_of(self), tensors)  # pyright: ignore[reportArgumentType]
        return result.to_tuple() if as_tuple else result

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the delta directory: rule, deltas and trained base tensors, never the base weights.

        Keyword arguments that transformers' method takes are accepted and have no meaning here.
        """
        from peftc.runtime.delta_dir import write_model

        write_model(self, Path(save_directory))

    def print_trainable_parameters(self) -> None:
        """Print trained and total counts, as PEFT does."""
        model: Any = self
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        fail(
            "E041",
            "activation checkpointing is not offered for adapted models",
            help="turn `gradient_checkpointing` off; the deltas themselves hold few activations",
        )

    def _prepare_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        fail(
            "E041",
            "`generate` on an adapted encoder-decoder would run the encoder without its deltas",
            help="call the model with input_ids and decoder_input_ids, or merge or export it first",
        )


def _refuse_caches(arguments: Mapping[str, Any]) -> None:
    given = [name for name in _CACHES if name in arguments]
    if given:
        fail(
            "E041",
            f"an adapted model takes no `{given[0]}`",
            help="call `generate(..., use_cache=False)`; its configuration is set so by default",
        )


def _delta_dtype(model: Any) -> torch.dtype | None:
    """The dtype that the deltas have now (a user may have converted the model), or None without deltas."""
    for name in model.surgery.plan.parameters:
        parameter = model.get_parameter(name)
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def state_of(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers by name, read through the module tree at each access, so that `.to()` holds."""
    return _State(model)


class _State(Mapping[str, torch.Tensor]):
    __slots__ = ("_model",)

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __getitem__(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(path), leaf)

    def __iter__(self) -> Any:
        yield from (name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@functools.cache
def _subclass(base: type[PreTrainedModel]) -> type[Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(base.forward).bind(self, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        return self._run({**arguments, **arguments.pop("kwargs", {})})

    return type("Peftc" + base.__name__, (GraphModel, base), {"forward": forward, "__module__": __name__})


def attach(model: PreTrainedModel, surgery: Surgery, values: Mapping[str, torch.Tensor]) -> Any:
    """Turn `model` into a `GraphModel`: register the deltas with `values`, freeze the rest, keep what the rule trains."""
    for name, parameter in surgery.plan.parameters.items():
        path, _, leaf = name.rpartition(".")
        owner = _container(model, path)
        value = values[name].to(device=model.device)
        owner.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=not parameter.frozen))
    trained = set(surgery.plan.trained)
    for name, parameter in model.named_parameters():
        if name not in surgery.plan.parameters:
            parameter.requires_grad_(name in trained)
    model.__class__ = _subclass(surgery.base_class)
    model._surgery = surgery  # pyright: ignore[reportAttributeAccessIssue]
    model.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False
    return model


def _container(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at `path`, whose last parts (from `peftc` on) are made when they are not there."""
    module = model
    parts = path.split(".")
    for index, part in enumerate(parts):
        child = getattr(module, part, None)
        if child is None:
            if "peftc" not in parts[: index + 1]:
                raise AttributeError(f"{type(model).__name__} has no module {'.'.join(parts[: index + 1])}")
            child = torch.nn.Module()
            module.add_module(part, child)
        module = child
    return module
