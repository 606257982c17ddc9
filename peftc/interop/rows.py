"""From an adapter's modules to rows: each module's layer of the table, its numbers, and the site of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftc.diagnostics import did_you_mean, fail
from peftc.interop.adapter import Adapter
from peftc.interop.layout import Module, candidates
from peftc.interop.names import is_target
from peftc.interop.options import indices, number
from peftc.interop.rule_text import Row
from peftc.interop.table import Layer, Method
from peftc.ir.program import Program
from peftc.ir.sites import Site
from peftc.lang.expr import evaluate_static
from peftc.lang.rule import Expr


def rows_of(adapter: Adapter, method: Method, modules: Sequence[Module], program: Program) -> dict[str, Row]:
    """The rows, by name: modules whose layer and numbers are the same share one.

    Raises `PeftcError`: E080, E081 (numbers), E082, a module that the model lacks or that lacks a tensor.
    """
    groups: dict[tuple[Any, ...], tuple[list[Site], dict[str, Module]]] = {}
    for module in _without_twins(adapter, method, modules, program):
        layer, sites = _placed(adapter, method, module, program)
        values = {name: _value(adapter, layer, module, entry, sites[0]) for name, entry in layer.values.items()}
        apart = (module.path,) if layer.tied else tuple(sites[0].dims[name] for name in layer.apart)
        key = (layer, tuple(values.items()), apart)
        places, found = groups.setdefault(key, ([], {}))
        places += sites
        found |= {site.path: module for site in sites}
    for layer in method.layers:
        if not layer.suffixes:
            values = {name: _value(adapter, layer, None, entry, None) for name, entry in layer.values.items()}
            sites = [site for site in program.sites if site.kind == layer.at]
            _refuse_other_meaning(method, layer, sites)
            groups[layer, tuple(values.items()), ()] = (sites, {})
    _refuse_absent(adapter, method, modules, program)
    rows: dict[str, Row] = {}
    for (layer, values, _), (sites, found) in groups.items():
        name = method.rule if not rows else f"{method.rule}_{len(rows) + 1}"
        rows[name] = Row(layer, dict(values), tuple(sites), found)
    return rows


def _refuse_other_meaning(method: Method, layer: Layer, sites: Sequence[Site]) -> None:
    """Refuse a model for which PEFT and the row differ. Raises `PeftcError` E081."""
    for tap, reason in layer.unless.items():
        if any(tap in site.taps for site in sites):
            message = f"a {method.peft_type} adapter of a model with a {tap} output is not read: {reason}"
            fail("E081", message, help="train it again with peftc: `peftc apply` has the method as a rule")


def _without_twins(adapter: Adapter, method: Method, modules: Sequence[Module], program: Program) -> Iterator[Module]:
    """The modules, less those that only repeat what a module with a tied weight has. Raises E082 where they differ."""
    embeddings = {module.path: module for module in modules if _sites(program, module.path, "embedding")}
    for module in modules:
        layers = list(candidates(method, frozenset(module.keys), adapter.config))
        if module.path in embeddings or not any(layer.tied for layer in layers):
            yield module
            continue
        own = next((m for path, m in embeddings.items() if module.path in _tied_paths(program, path)), None)
        if own is None or own.keys.keys() != module.keys.keys():
            yield module
        elif any(not adapter.read(own.keys[name]).equal(adapter.read(module.keys[name])) for name in own.keys):
            message = f"{adapter.path}: {module.first} and {own.first} differ, and are of one tied weight"
            fail("E082", message, help="save the adapter again")


def _sites(program: Program, path: str, kind: str) -> list[Site]:
    return [site for site in program.sites if site.path == path and site.kind == kind]


def _tied_paths(program: Program, path: str) -> set[str]:
    """The modules whose weight is tied to that of the module at `path`, with it."""
    owner = program.tied.get(f"{path}.weight", f"{path}.weight")
    names = {owner, *(name for name, first in program.tied.items() if first == owner)}
    return {name.removesuffix(".weight") for name in names}


def _placed(adapter: Adapter, method: Method, module: Module, program: Program) -> tuple[Layer, list[Site]]:
    """The layer of the table that the module has, and its sites."""
    suffixes = frozenset(module.keys)
    layers = list(candidates(method, suffixes, adapter.config))
    if not layers:
        _refuse_suffixes(adapter, method, module, suffixes)
    found = [(layer, _sites(program, module.path, layer.at)) for layer in layers]
    placed = [(layer, sites) for layer, sites in found if sites]
    for layer, sites in placed:
        if all(_fits(adapter, module.keys[layer.tensors[name].key], layer.fits[name], sites[0]) for name in layer.fits):
            return layer, _with_tied(program, sites) if layer.tied else sites
    if placed:
        key, site = module.first, placed[0][1][0]
        message = f"{adapter.path}: {key} is {list(adapter.tensors[key].shape)}, which does not fit {site.describe()}"
        fail("E082", message, help="the adapter was made for a base of other sizes: name the right one with --model")
    _refuse_stacked(adapter, method, module, program)
    kinds = " or ".join(dict.fromkeys(layer.at for layer in layers))
    wanted = {site.path for site in program.sites if site.kind in {layer.at for layer in layers}}
    message = f"{adapter.path}: {module.first} is for a {kinds} layer {module.path}, which the model lacks"
    near = did_you_mean(module.path, wanted) or ""
    fail("E082", message, help=near if near.startswith("did") else "name the adapter's base with --model or --head")


def _refuse_stacked(adapter: Adapter, method: Method, module: Module, program: Program) -> None:
    """Refuse `target_parameters` of experts, which PEFT wraps one around the other. Raises `PeftcError` E081."""
    path = module.path.partition(".base_layer")[0]
    if _sites(program, path, "experts"):
        message = f"{adapter.path}: {module.first} is {method.doc} on the stacked weights of the experts {path}"
        help = "merge the adapter with PEFT (`merge_and_unload`), and use the model that it saves"
        fail("E081", f"{message} (`target_parameters`), which is not read yet", help=help)


def _refuse_absent(adapter: Adapter, method: Method, modules: Sequence[Module], program: Program) -> None:
    """PEFT would start a module anew that `target_modules` means and that the file lacks."""
    config, here = adapter.config, {module.path for module in modules}
    target, kinds = config.get("target_modules"), {layer.at for layer in method.layers if layer.at != "embedding"}
    if not isinstance(target, (str, list)) or target == "all-linear" or config.get("layers_to_transform"):
        return
    left_out = (config.get("exclude_modules") or [], config.get("modules_to_save") or [])
    for site in program.sites:
        wanted = site.kind in kinds and site.path not in here and is_target(target, site.path, unknown=False)
        if wanted and not any(is_target(names, site.path) for names in left_out):
            message = f"{adapter.path}: `target_modules` names {site.path}, and the adapter has no tensor of it"
            fail("E082", message, help="the file is not whole, or the adapter was made for a smaller model")


def _with_tied(program: Program, sites: list[Site]) -> list[Site]:
    paths = _tied_paths(program, sites[0].path)
    return [site for site in program.sites if site.path in paths and site.kind in ("embedding", "linear")]


def _fits(adapter: Adapter, key: str, shape: Sequence[Expr], site: Site) -> bool:
    return adapter.tensors[key].shape == tuple(evaluate_static(size, site.dims) for size in shape)


def _refuse_suffixes(adapter: Adapter, method: Method, module: Module, suffixes: frozenset[str]) -> None:
    nearest = max(method.layers, key=lambda layer: (len(layer.suffixes & suffixes), -len(layer.suffixes)))
    missing = sorted(nearest.suffixes - suffixes)
    if missing:
        message = f"{adapter.path}: {module.path}.{missing[0]} is missing, beside {module.first}"
    else:
        message = f"{adapter.path}: {', '.join(sorted(suffixes))} of {module.path} are not tensors of one layer"
    fail("E082", message, help="the file is not whole, or the adapter is of a kind that peftc does not read")


def _value(adapter: Adapter, layer: Layer, module: Module | None, entry: Any, site: Site | None) -> Any:
    """A number of the row, for one module; None where the layer's tensors are the whole model's."""
    path = "" if module is None else module.path
    if not isinstance(entry, Mapping):
        return entry
    if "indices" in entry or "count" in entry:
        found = indices(adapter, entry.get("indices") or entry["count"], path)
        return found if "indices" in entry else len(found)
    if "option" in entry:
        return number(adapter, entry, path)
    *over, parameter, axis = entry.get("size") or entry["over"]
    view = layer.tensors[parameter]
    key = view.key[1:] if module is None else module.keys[view.key]
    if key not in adapter.tensors:
        fail("E082", f"{adapter.path}: {key} is missing", help="the file is not whole: save the adapter again")
    size = adapter.tensors[key].shape[axis]
    return int(site.dims[over[0]]) // size if over and site is not None else size
