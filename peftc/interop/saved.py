"""Parameters of the base that a rule trains, as PEFT saves them: biases, or modules saved whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from peftc.diagnostics import fail
from peftc.interop.layout import PREFIX
from peftc.interop.table import Method
from peftc.ir.program import Program


@dataclass(frozen=True, slots=True)
class Saved:
    """Trained parameters under the names of an adapter, and the options that make PEFT read them."""

    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name in the adapter -> parameter of the model."""
    options: Mapping[str, Any] = field(default_factory=dict)


def saved_parameters(
    trained: Collection[str], parameters: Collection[str], adapted: Collection[str], *, biases: bool, prefix: str
) -> Saved:
    """How an adapter holds `trained`; `adapted` are its modules, `biases` whether its method has a `bias`
    option, `prefix` what stands before the names of modules that are saved whole.

    Raises `PeftcError` E083: a module is trained in part, and PEFT saves modules whole.
    """
    if not trained:
        return Saved()
    every = {name for name in parameters if name.endswith("bias")}
    own = {f"{path}.bias" for path in adapted} & every
    for word, names in (("all", every), ("lora_only", own)) if biases else ():
        if names and names <= set(trained):
            rest = _modules(set(trained) - names, parameters, adapted, names)
            return Saved({**_biases(names, adapted), **rest.tensors}, {"bias": word, **rest.options})
    return _modules(set(trained), parameters, adapted, frozenset(), prefix)


def _biases(names: Collection[str], adapted: Collection[str]) -> dict[str, str]:
    found = {}
    for name in names:
        path = name.rpartition(".")[0]
        found[f"{PREFIX}{path}.base_layer.bias" if path in adapted else PREFIX + name] = name
    return found


def _modules(
    trained: Collection[str],
    parameters: Collection[str],
    adapted: Collection[str],
    also: Collection[str],
    prefix: str = PREFIX,
) -> Saved:
    paths = sorted({name.rpartition(".")[0] for name in trained})
    for path in paths:
        inside = {name for name in parameters if name.rpartition(".")[0] == path}
        left = inside - {*trained, *also}
        if left or path in adapted:
            reason = f"and not {sorted(left)[0]}" if left else "beside a delta of the same module"
            first = next(name for name in sorted(trained) if name.startswith(f"{path}."))
            message = f"the rule trains {first} {reason}: PEFT saves trained modules whole"
            fail("E083", message, help="train whole modules (`train: [MODULE.*]`), or all biases")
    if not paths:
        return Saved()
    names = [name for name in parameters if name.rpartition(".")[0] in paths]
    return Saved({prefix + name: name for name in names}, {"modules_to_save": paths})


def saved_behind(trained: Collection[str], parameters: Collection[str], program: Program, method: Method) -> Saved:
    """Parameters that a method trains as they are, each behind its word; other modules are saved whole.

    Raises `PeftcError` E083: it trains none of its own.
    """
    word, kind = method.trains["behind"], method.trains["at"]
    paths = {site.path for site in program.sites if site.kind == kind}
    own = [name for name in trained if name.rpartition(".")[0] in paths]
    if not own:
        what = f"{next(iter(trained))} and no delta" if trained else "nothing that is stored"
        message = f"the rule trains {what}: adapters of PEFT without deltas are those of {kind}s"
        fail("E083", message, help="save the model itself: `peftc merge`")
    rest = _modules(set(trained) - {*own}, parameters, {name.rpartition(".")[0] for name in own}, frozenset())
    tensors = {f"{PREFIX}{name.rpartition('.')[0]}.{word}.{name.rpartition('.')[2]}": name for name in own}
    targets = sorted({name.rpartition(".")[0] for name in own})
    return Saved({**tensors, **rest.tensors}, {"target_modules": targets, **rest.options})
