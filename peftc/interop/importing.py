"""Import: an adapter of PEFT becomes a rule and a delta directory, which `peftc.load` and `peftc merge` take.

    report = import_adapter("my-lora", "peftc-out", model_dir="bert")
    report.plan.edits       # one for each module of the adapter

Every tensor of the adapter lands in the delta directory, bit for bit and in the dtype it has, or there is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.diagnostics import fail
from peftc.interop.adapter import Adapter
from peftc.interop.base import Base, model_dir_of, open_base
from peftc.interop.layout import Layout, Module, layout_of
from peftc.interop.options import method_of
from peftc.interop.reading import Source, viewed, viewed_shape
from peftc.interop.report import ImportReport
from peftc.interop.rows import rows_of
from peftc.interop.rule_text import Row, rule_text
from peftc.interop.table import View
from peftc.lang.loader import parse_rule
from peftc.pipeline import rewrite
from peftc.planning.plan import Edit, Plan
from peftc.progress import NullProgress, Progress
from peftc.runtime.api import base_reference, new_parameters
from peftc.runtime.delta_dir import RULE, refuse_trained, write_files
from peftc.store.atomic import atomic_directory, check_target
from peftc.store.base_weights import BaseWeights
from peftc.store.safetensors_io import TensorSpec

if TYPE_CHECKING:
    import torch


def import_adapter(
    adapter_dir: str | Path,
    out: str | Path,
    *,
    model_dir: str | Path | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Read the adapter at `adapter_dir` and write the delta directory `out`.

    `model_dir` is the base (default: where the adapter says it is); `head` and `num_labels` choose the model's class,
    by default the one that the adapter was made for.

    Raises `PeftcError`: E030 to E033 (the base), E036 (the place), E031, E042, E080 to E082 (the adapter).
    """
    progress = progress or NullProgress()
    adapter = Adapter.open(adapter_dir)
    method = method_of(adapter)
    directory = model_dir_of(adapter, model_dir)
    check_target(out, replace=True)
    refuse_trained(Path(out))
    base = open_base(adapter, directory, head, num_labels, progress)
    layout = layout_of(adapter, method, base.parameters)
    trained = _trained(adapter, layout, base)
    rows = rows_of(adapter, method, layout.modules, base.program)
    text = rule_text(method, rows, adapter.config, trained, base)
    plan = rewrite(base.program, parse_rule(text, RULE), fresh=new_parameters(directory, base.skeleton))
    sources = {**_delta_sources(adapter, rows, plan), **_base_sources(adapter, trained, plan, base)}
    progress.step(f"write {out}")
    _write(Path(out), adapter, base, plan, sources, progress)
    return ImportReport(Path(out), adapter.path, method, plan, base.skeleton.model.__class__.__name__, sources)


def _trained(adapter: Adapter, layout: Layout, base: Base) -> dict[str, str]:
    """The parameters of the base that the adapter has trained, each with its tensor. Raises `PeftcError` E082."""
    weights = BaseWeights(base.directory, base.skeleton.model)
    found: dict[str, str] = {}
    for name, key in layout.trained.items():
        owner = base.program.tied.get(name)
        if owner is not None and not (owner in layout.trained and _same(adapter, key, layout.trained[owner])):
            message = f"{adapter.path}: {key} is a weight of its own, and {name} of the model is tied to {owner}"
            fail("E082", message, help="save the base model with the two untied, and import the adapter for that one")
        if name in layout.saved_base and _is_base(adapter.read(key), weights, name):
            continue
        found[name] = key
    return found


def _same(adapter: Adapter, one: str, other: str) -> bool:
    return adapter.read(one).equal(adapter.read(other))


def _is_base(value: torch.Tensor, weights: BaseWeights, name: str) -> bool:
    """Whether a tensor is the base's own, in the base's dtype."""
    own = weights(name)
    return own.shape == value.shape and own.equal(value.to(own.dtype))


def _delta_sources(adapter: Adapter, rows: Mapping[str, Row], plan: Plan) -> dict[str, Source]:
    """Where each parameter of the plan's deltas comes from. Raises `PeftcError` E082: another shape."""
    found: dict[str, Source] = {}
    for edit in plan.edits:
        row = rows[edit.delta.name]
        module = row.modules.get(edit.site.path)
        for name, parameter in edit.parameters.items():
            if parameter is not None and parameter.name not in found:
                found[parameter.name] = _source(adapter, row.layer.tensors[name], module, edit, parameter.shape)
    return found


def _source(adapter: Adapter, view: View, module: Module | None, edit: Edit, shape: tuple[int, ...]) -> Source:
    key = view.key[1:] if not view.owned or module is None else module.keys[view.key]
    info = adapter.tensors[key]
    seen = viewed_shape(view, info.shape, edit.statics)
    if seen is None or _squeezed(seen) != _squeezed(shape):
        message = f"{adapter.path}: {key} is {list(info.shape)}, and {edit.site.describe()} takes {list(shape)}"
        fail("E082", message, help="the adapter was made for a base of other sizes: name the right one with --model")
    return Source(key, info.dtype, shape, view, edit.statics)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _base_sources(adapter: Adapter, trained: Mapping[str, str], plan: Plan, base: Base) -> dict[str, Source]:
    """Where each trained parameter of the base comes from. Raises `PeftcError` E082: another shape."""
    found: dict[str, Source] = {}
    parameters = base.parameters
    for name in plan.trained:
        if name not in trained:
            continue  # a head that is neither in the checkpoint nor in the adapter starts from the seed
        info, shape = adapter.tensors[trained[name]], tuple(parameters[name].shape)
        if info.shape != shape:
            message = f"{adapter.path}: {trained[name]} is {list(info.shape)}, and {name} of the model {list(shape)}"
            fail("E082", message, help="the adapter was made for another base, or one with another vocabulary or head")
        found[name] = Source(trained[name], info.dtype, shape)
    return found


def _write(
    out: Path, adapter: Adapter, base: Base, plan: Plan, sources: Mapping[str, Source], progress: Progress
) -> None:
    def produce(name: str) -> torch.Tensor:
        source = sources[name]
        value = adapter.read(source.key)
        if source.view is not None and source.sizes is not None:
            value = viewed(source.view, value, source.sizes)
        return value.reshape(source.shape)

    def support(fresh: Path) -> None:
        base.directory.copy_support_files(fresh)
        base.skeleton.model.config.save_pretrained(fresh)

    with atomic_directory(out, replace=True) as fresh:
        write_files(
            fresh,
            out,
            plan=plan,
            base=base_reference(base.directory, base.head, base.num_labels, 0),
            entries=[TensorSpec(name, source.dtype, source.shape) for name, source in sources.items()],
            produce=produce,
            support=support,
            saved=True,
            progress=progress.update,
        )
