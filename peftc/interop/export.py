"""Export: a delta directory becomes an adapter that `PeftModel.from_pretrained` reads.

    export_adapter("peftc-out", "my-lora").peft_type     # "LORA"

Every tensor of the delta directory lands in the adapter, bit for bit and in the dtype it has; deltas that no method of
PEFT computes are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peftc.diagnostics import fail
from peftc.interop.adapter import CONFIG, WEIGHTS
from peftc.interop.base import task_of
from peftc.interop.configuring import configured
from peftc.interop.fitting import Fit, fits
from peftc.interop.layout import PREFIX, SHORT_PREFIX
from peftc.interop.packing import Piece, packed, packed_shape
from peftc.interop.report import ExportReport
from peftc.interop.saved import Saved, saved_behind, saved_parameters
from peftc.interop.table import Method, methods
from peftc.interop.vllm import refuse_for_vllm
from peftc.ir.program import Program
from peftc.pipeline import analyse
from peftc.planning.plan import Edit, Plan, make_plan
from peftc.progress import NullProgress, Progress
from peftc.runtime.api import check_fingerprint, new_parameters
from peftc.runtime.delta_dir import DeltaDir, check_names
from peftc.store.atomic import atomic_directory
from peftc.store.heads import resolve
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import TensorSpec, write

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Opened:
    """A delta directory with the plan of its rule on the base."""

    delta: DeltaDir
    base: ModelDir
    program: Program
    plan: Plan
    parameters: Mapping[str, Any]
    cls: type[PreTrainedModel]


def export_adapter(
    directory: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    vllm: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the deltas at `directory` as an adapter of PEFT; `base` says where the base model is if it has moved.

    With `vllm` what vLLM would not load is refused as well.

    Raises `PeftcError`: as `peftc.load` does; E083, the deltas do not fit the format; E036, the place.
    """
    progress = progress or NullProgress()
    opened = _opened(directory, base, progress)
    method, found = _fitted(opened)
    adapted = {fit.path for fit in found if fit.layer.targets}
    saved = _saved(opened, method, adapted)
    task = task_of(opened.base, opened.cls)
    config = configured(method, found, saved, opened.program, opened.delta.manifest["base"]["path"], task)
    if vllm:
        refuse_for_vllm(config)
    pieces = _pieces(opened, found)
    progress.step(f"write {out}")
    _write(Path(out), opened, config, pieces, saved)
    return ExportReport(Path(out), opened.delta.path, method.peft_type, len(adapted), sorted(saved.tensors.values()))


def _opened(directory: str | Path, base: str | Path | None, progress: Progress) -> Opened:
    from peftc.frontend.trace import build_skeleton, default_inputs

    delta = DeltaDir.open(directory)
    source = ModelDir.open(delta.base_dir(base))
    check_fingerprint(delta, source)
    reference = delta.manifest["base"]
    cls, config = resolve(source.config, source.path, reference["head"], reference["num_labels"])
    progress.step(f"trace {cls.__name__}")
    skeleton = build_skeleton(cls, config)
    program = analyse(skeleton, default_inputs(skeleton.model))
    plan = make_plan(delta.rule, program, fresh=new_parameters(source, skeleton))
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    shapes = {name: parameter.shape for name, parameter in plan.parameters.items()}
    check_names(delta.path, delta.header.tensors, shapes, {n: tuple(parameters[n].shape) for n in plan.trained})
    return Opened(delta, source, program, plan, parameters, cls)


def _saved(opened: Opened, method: Method, adapted: set[str]) -> Saved:
    """The base's parameters that are stored; a head that never trained is not. Raises `PeftcError` E083."""
    trained = [name for name in opened.plan.trained if name in opened.delta.header.tensors]
    if method.trains:
        return saved_behind(trained, opened.parameters, opened.program, method)
    prefix = PREFIX if method.suffixes else SHORT_PREFIX
    biases = "lora_A.weight" in method.suffixes
    saved = saved_parameters(trained, opened.parameters, adapted, biases=biases, prefix=prefix)
    absent = [name for name in saved.tensors.values() if name not in opened.delta.header.tensors]
    if absent:
        message = f"{opened.delta.path} holds no {absent[0]}, which PEFT would save: it is tied, or was never trained"
        fail("E083", message, help="save the trained model again")
    return saved


def _fitted(opened: Opened) -> tuple[Method, list[Fit]]:
    """The method that has a layer for every edit. Raises `PeftcError` E083."""
    edits = [edit for edit in opened.plan.edits if edit.parameters or edit.delta.sets or edit.delta.value is not None]
    best: tuple[int, str, Edit | None] = (-1, "", None)
    if not edits:
        return next(method for method in methods().values() if method.trains), []
    for method in methods().values():
        found: list[Fit] = []
        for edit in edits:
            answers = list(fits(edit, method, opened.program))
            fit = next((answer for answer in answers if isinstance(answer, Fit)), None)
            if fit is None:
                reasons = [answer for answer in answers if isinstance(answer, str)]
                rank = 2 * len(found) + bool(reasons)
                best = max(best, (rank, reasons[0] if reasons else "", edit), key=lambda one: one[0])
                break
            found.append(fit)
        if len(found) == len(edits) and any(fit.layer.targets for fit in found):
            return method, found
    _refuse(*best)


def _refuse(rank: int, reason: str, edit: Edit | None) -> NoReturn:
    assert edit is not None
    delta = edit.delta
    form = f"form `{delta.form.name}`" if delta.form.name else "its form"
    reason = reason or f"no method of PEFT computes {form} composed as `{delta.compose.text}`"
    if rank > 1:
        reason += ", or none that also has the rows before it"
    place = "" if delta.span is None else f" at {edit.site.describe()}"
    docs = dict.fromkeys(method.doc for method in methods().values())
    known = f"peftc writes adapters of {', '.join(docs)}, one method in an adapter"
    fail("E083", f"delta `{delta.name}`{place} is not of PEFT's format: {reason}", span=delta.span, help=known)


def _pieces(opened: Opened, found: list[Fit]) -> dict[str, list[Piece]]:
    """The parts of every tensor of the adapter."""
    pieces: dict[str, list[Piece]] = {}
    for fit in found:
        for name, parameter in fit.edit.parameters.items():
            if parameter is None:
                continue
            view = fit.layer.tensors[name]
            key = f"{PREFIX}{fit.path}.{view.key}" if view.owned else view.key[1:]
            info = opened.delta.header.tensors[parameter.name]
            sizes = {**fit.edit.site.dims, **fit.edit.statics}
            piece = Piece(parameter.name, parameter.shape, info.dtype, view, sizes, fit.layer.fits.get(name, ()))
            if all(piece.name != other.name or view.take for other in pieces.setdefault(key, [])):
                pieces[key].append(piece)
    return pieces


def _write(
    out: Path, opened: Opened, config: Mapping[str, Any], pieces: Mapping[str, list[Piece]], saved: Saved
) -> None:
    def produce(key: str) -> torch.Tensor:
        if key in saved.tensors:
            return opened.delta.read(saved.tensors[key])
        return packed(key, pieces[key], opened.delta.read)

    entries = [TensorSpec(key, parts[0].dtype, packed_shape(parts)) for key, parts in pieces.items()]
    for key, name in saved.tensors.items():
        info = opened.delta.header.tensors[name]
        entries.append(TensorSpec(key, info.dtype, info.shape))
    with atomic_directory(out, replace=False) as fresh:
        write(fresh / WEIGHTS, entries, produce, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
