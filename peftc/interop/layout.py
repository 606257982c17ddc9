"""Which tensor of an adapter belongs to which layer, and which are tensors of the base model trained as they are.

Nothing is left over: a tensor that no layer of the method has and that no parameter of the model is called is an error
that names it, and so is a layer with a tensor too few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from peftc.diagnostics import did_you_mean, fail
from peftc.interop.adapter import Adapter
from peftc.interop.names import is_target
from peftc.interop.table import Layer, Method

PREFIX: Final = "base_model.model."
SHORT_PREFIX: Final = "base_model."
"""Of modules that a virtual prompt saves: its model wraps the base itself."""
_WRAPPERS: Final = frozenset({"base_layer", "modules_to_save", "original_module", "ln_tuning_layers"})
"""What PEFT puts between the name of a module and that of its parameter."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module with tensors of the method: their names in the file, by what stands behind the module's name."""

    path: str
    keys: Mapping[str, str]

    @property
    def first(self) -> str:
        return next(iter(self.keys.values()))


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of an adapter, sorted."""

    modules: tuple[Module, ...]
    trained: Mapping[str, str] = field(default_factory=dict)
    """Parameter of the base model -> the tensor that takes its place."""
    global_keys: frozenset[str] = frozenset()
    """Tensors of the method that belong to no module."""
    saved_base: frozenset[str] = frozenset()
    """Those of `trained` that may be saved without having been trained: a wrapped layer's own."""


def layout_of(adapter: Adapter, method: Method, parameters: Mapping[str, Any]) -> Layout:
    """Sort the tensors; `parameters` are those of the base model by name. Raises `PeftcError` E082."""
    known = frozenset(view.key[1:] for layer in method.layers for view in layer.tensors.values() if not view.owned)
    modules: dict[str, dict[str, str]] = {}
    trained: dict[str, str] = {}
    saved: set[str] = set()
    strange: list[str] = []
    for key in adapter.tensors:
        owner = _owner(key, method)
        if key in known:
            continue
        if owner is not None:
            path, suffix = owner
            modules.setdefault(path, {})[suffix] = key
        elif ".original_module." in key:
            continue  # what a module to save was before training; its place is taken, so PEFT never runs it
        elif (name := _parameter(key, parameters)) is not None:
            _join(adapter, trained, name, key)
            saved |= {name} if ".base_layer." in key and not name.endswith("bias") else set()
        else:
            strange.append(key)
    if strange:
        _refuse_strange(adapter, method, strange, parameters)
    found = tuple(Module(path, keys) for path, keys in modules.items())
    _check_targets(adapter, found)
    return Layout(found, trained, known & adapter.tensors.keys(), frozenset(saved))


def _owner(key: str, method: Method) -> tuple[str, str] | None:
    """The module, and what stands behind its name."""
    if not key.startswith(PREFIX):
        return None
    name = key.removeprefix(PREFIX)
    for suffix in method.suffixes:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    return None


def _parameter(key: str, parameters: Mapping[str, Any]) -> str | None:
    """The parameter of the base model that a tensor is called after."""
    for prefix in (PREFIX, SHORT_PREFIX):
        name = ".".join(part for part in key.removeprefix(prefix).split(".") if part not in _WRAPPERS)
        if key.startswith(prefix) and name in parameters:
            return name
    return None


def _join(adapter: Adapter, trained: dict[str, str], name: str, key: str) -> None:
    """A module may be saved under two names, with and without `modules_to_save`: one tensor, stored twice."""
    other = trained.setdefault(name, key)
    if other != key and not adapter.read(other).equal(adapter.read(key)):
        message = f"{adapter.path}: {other} and {key} are both {name} of the base model, and differ"
        fail("E082", message, help="save the adapter again")
    if ".modules_to_save." not in key:
        trained[name] = key


def _refuse_strange(adapter: Adapter, method: Method, strange: list[str], parameters: Mapping[str, Any]) -> None:
    more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
    message = f"{adapter.path}: {strange[0]}{more} is no tensor of a {method.peft_type} adapter, and no parameter of"
    name = strange[0].removeprefix(PREFIX)
    near = did_you_mean(name, parameters) or ""
    help = near if near.startswith("did") else "the adapter was made for another model or head: name it with --head"
    fail("E082", f"{message} the model", help=help)


def _check_targets(adapter: Adapter, modules: tuple[Module, ...]) -> None:
    """PEFT would leave out the tensors of a module that `target_modules` does not mean, and say nothing."""
    target = adapter.config.get("target_modules")
    if not isinstance(target, (str, list)) or target == "all-linear" or adapter.config.get("target_parameters"):
        return
    lost = [module for module in modules if not is_target(target, module.path) and not _of_tokens(module)]
    if lost:
        message = f"{adapter.path}: {lost[0].first} is of a module that `target_modules` does not name"
        fail("E082", message, help="the tensors and adapter_config.json are of different saves")


def _of_tokens(module: Module) -> bool:
    return any("trainable_tokens" in suffix for suffix in module.keys)


def candidates(method: Method, suffixes: frozenset[str], options: Mapping[str, Any]) -> Iterator[Layer]:
    """The layers of the method that have just these tensors, as far as the options say."""
    for layer in method.layers:
        if layer.suffixes == suffixes and all(options.get(name, value) == value for name, value in layer.when.items()):
            yield layer
