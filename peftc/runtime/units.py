"""Units: the modules of a model that have to be called, and the calls that run parts of the graph in them.

A unit is a module that something acts on when it is called: it has hooks (those of FSDP2 are such), or its activations
are to be computed again in the backward pass. Its own `forward` stays what it was for whoever calls it; only a call
that brings a part of the graph runs that part.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from peftc.diagnostics import fail

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def units_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the modules below `model` that have to be called, as it stands now."""
    return tuple(
        path
        for path, module in model.named_modules()
        if path and (any(getattr(module, hooks) for hooks in _HOOKS) or computes_again(module))
    )


def paths_of(model: torch.nn.Module, units: Sequence[str]) -> dict[str, str]:
    """Every path of each unit (a shared module has several) to the path in `units`."""
    first = {id(model.get_submodule(path)): path for path in units}
    every = model.named_modules(remove_duplicate=False)
    return {path: first[id(module)] for path, module in every if id(module) in first}


def checkpoints(module: torch.nn.Module) -> bool:
    """Whether the activations of this layer are computed again: transformers marks layers so."""
    marked = module.__dict__.get("gradient_checkpointing", getattr(type(module), "gradient_checkpointing", False))
    return bool(marked) and is_layer(module)  # asked of every module at every call, so past Module's own getattr


def is_layer(module: torch.nn.Module) -> bool:
    """Whether it is a layer that is checkpointed, not a container that carries the mark for its layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer) or module.__dict__.get("_peftc_layer", False)


def gathered_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The dtype in which FSDP2 gathers parameters (`MixedPrecisionPolicy`); None where they keep theirs."""
    state = getattr(model, "_get_fsdp_state", None)
    return None if state is None else getattr(getattr(state(), "_mp_policy", None), "param_dtype", None)


def computes_again(module: torch.nn.Module) -> bool:
    """Whether a call of this layer now is computed again in the backward pass."""
    return checkpoints(module) and module.training and torch.is_grad_enabled()


def mark_layers(
    model: torch.nn.Module, blocks: Collection[str], called: Collection[str], function: Callable[..., Any], every: int
) -> None:
    """Mark each `every`-th layer, or with 0 none, as one whose activations `function` computes again.

    Layers are what transformers calls layers, and beside them the modules at or in `blocks` that the graph calls and
    that neither hold nor are in one; `called` are the paths of all modules that it calls. Raises `PeftcError` E041 when
    none is called.
    """
    layers = {path: module for path, module in model.named_modules() if is_layer(module)}
    for path in blocks:
        if not any(_related(path, other) for other in layers):
            inside = [other for other in called if _inside(other, path)]
            layers |= {p: model.get_submodule(p) for p in inside if not any(_inside(p, q) for q in inside if q != p)}
    if not any(path in called for path in layers):
        reason = "no layer of it is known whose activations could be computed again"
        fail("E041", f"{type(model).__name__} cannot checkpoint activations: {reason}", help="turn checkpointing off")
    own: dict[torch.nn.Module, int] = {layer: index for index, layer in enumerate(layers.values())}
    for module in model.modules():
        if module in own or hasattr(module, "gradient_checkpointing"):
            marked: Any = module
            marked.__dict__["_peftc_layer"] = module in own
            marked._gradient_checkpointing_func = function
            marked.gradient_checkpointing = every > 0 and own.get(module, 0) % every == 0


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _related(path: str, other: str) -> bool:
    return _inside(path, other) or _inside(other, path)


def call_unit(module: torch.nn.Module, run: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call `module` so that its hooks act and `run(*arguments)` is its forward."""
    own = module.__dict__.get("forward")
    if getattr(own, "__func__", None) is not _forward:
        module.forward = types.MethodType(_forward, module)  # pyright: ignore[reportAttributeAccessIssue]
    return module(*arguments, peftc_run=run)


def _forward(self: Any, *args: Any, peftc_run: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    if peftc_run is None:
        return type(self).forward(self, *args, **kwargs)
    # transformers 5.20 wraps `__call__` of such layers in the checkpoint, later ones wrap `forward` of the class
    wrapped = type(self).__call__ is not torch.nn.Module.__call__
    if computes_again(self) and not wrapped:
        return self._gradient_checkpointing_func(peftc_run, *args)
    return peftc_run(*args)
