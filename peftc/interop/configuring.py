"""The configuration of an exported adapter: PEFT's options for the layers that it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peftc.diagnostics import fail
from peftc.interop.fitting import Fit, names_of
from peftc.interop.saved import Saved
from peftc.interop.table import Method, static
from peftc.ir.program import Program
from peftc.lang.expr import evaluate_static


def configured(
    method: Method, found: Sequence[Fit], saved: Saved, program: Program, path: str, task: str | None
) -> dict[str, Any]:
    """adapter_config.json as a value; `path` is the base's, `task` PEFT's word for its head.

    Raises `PeftcError` E083: layers that no one configuration describes.
    """
    config: dict[str, Any] = {"peft_type": method.peft_type, "base_model_name_or_path": path}
    config |= {"task_type": task, "inference_mode": True, **saved.options}
    config |= _constants(method, found)
    config |= _numbers(found)
    config |= _lists(found)
    for option in dict.fromkeys(fit.layer.lists for fit in found if fit.layer.lists):
        config[option] = sorted({fit.path for fit in found if fit.layer.lists == option})
    paths = {fit.path for fit in found if fit.layer.at != "model" and fit.layer.targets}
    if paths:
        listed = any(fit.layer.lists for fit in found)
        config["target_modules"] = sorted(paths) if listed else _targets(paths, program)
        config["fan_in_fan_out"] = any(fit.transposed for fit in found)
    return config


def _constants(method: Method, found: Sequence[Fit]) -> dict[str, Any]:
    """Options that all layers must agree on."""
    every = {key for layer in method.layers for key in layer.config}
    config: dict[str, Any] = {}
    for fit in found:
        values = {**{key: _constant(fit, key) for key in every}, **fit.flags}
        for key, value in values.items():
            if config.setdefault(key, value) != value:
                message = f"{fit.path} has `{key}: {value}`, and another layer `{config[key]}`"
                fail("E083", f"{message}: an adapter of PEFT has one for all", help="keep one of them")
    return config


def _constant(fit: Fit, key: str) -> Any:
    """An option that a layer has: a value, or an expression over the numbers of its row."""
    value = fit.layer.config.get(key, False)
    return evaluate_static(static(value), fit.edit.statics) if isinstance(value, str) else value


def _numbers(found: Sequence[Fit]) -> dict[str, Any]:
    """Options with a value for each module: the most common one, and patterns for the others."""
    values: dict[tuple[str, str | None], dict[str, Any]] = {}
    for fit in found:
        for name, entry in fit.layer.values.items():
            if not isinstance(entry, Mapping):
                continue
            option = entry.get("saves") or entry.get("option")
            if option is not None:
                number = fit.options.get(option) if "option" in entry else fit.edit.statics[name]
                values.setdefault((option, entry.get("pattern")), {})[fit.path] = number
    config: dict[str, Any] = {}
    for (option, pattern), numbers in values.items():
        common = Counter(numbers.values()).most_common(1)[0][0]
        others = {path: number for path, number in numbers.items() if number != common}
        config[option] = common
        if others and pattern is None:
            path, number = next(iter(others.items()))
            message = f"`{option}` is {number} at {path} and {common} elsewhere"
            fail("E083", f"{message}: an adapter of PEFT has one for all", help="keep one of them")
        if pattern is not None:
            config[pattern] = others
    return config


def _lists(found: Sequence[Fit]) -> dict[str, Any]:
    """Options that list numbers: for all modules, or for each."""
    config: dict[str, Any] = {}
    for fit in found:
        for entry in fit.layer.values.values():
            if isinstance(entry, Mapping) and "indices" in entry:
                read = names_of(fit.edit)
                numbers = next([*v] for n, v in fit.edit.statics.items() if n in read and isinstance(v, tuple))
                earlier = config.get(entry["indices"], {})
                config[entry["indices"]] = {**earlier, fit.path: numbers} if "by" in entry else numbers
    return config


def _targets(paths: Collection[str], program: Program) -> list[str]:
    """Names that mean these modules: their last parts where that means no other module, else the whole."""
    modules = {site.path for site in program.sites if site.kind in ("linear", "embedding", "conv")} | set(paths)
    short = {path.rpartition(".")[2] for path in paths}
    meant = {path for path in modules if path.rpartition(".")[2] in short}
    return sorted(short) if meant == set(paths) else sorted(paths)
