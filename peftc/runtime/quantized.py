"""A quantized base: the weights of linear layers held in few bits, deltas and all else as they are.

    model = peftc.load("peftc-out", quantize="nf4")    # or peftc.apply("lora", "base", quantize="int8")

Each module keeps its data under `weight` and its scales under `peftc_scale`, and computes by itself too (inside
`disable()`). The output embeddings, weights that are shared and weights that the rule trains stay whole. Deltas
that were trained so are deltas on the rounded weights, so their directory says how they were rounded and how far that
is from the base: `load` rounds again, and a merge into the base itself is refused. `save_dequantized` writes a plain
checkpoint of the rounded weights, and the deltas on it, which merge exactly.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc import quantization
from peftc.diagnostics import did_you_mean, fail
from peftc.passes.quantize import SCALE

if TYPE_CHECKING:
    from peftc.runtime.delta_dir import DeltaDir

OFF = "off"


@dataclass(frozen=True, slots=True)
class Quantized:
    """What of a model is quantized: the form of each parameter by name, and how far they are from the base's."""

    forms: dict[str, str]
    drift: float
    """The Frobenius norm of what rounding changed, over that of the weights."""


def check_form(form: str | None, recorded: Any = None) -> str:
    """The form that is asked for, or the recorded one; "off" for none. Raises `PeftcError` E055."""
    if form is None:
        form = recorded["form"] if isinstance(recorded, dict) else OFF
    if form not in (*quantization.FORMS, OFF):
        fail("E055", f"there is no quantized form `{form}`", help=did_you_mean(str(form), (*quantization.FORMS, OFF)))
    if form == OFF and isinstance(recorded, dict):
        trained_on = f"{recorded['form']} weights, {100 * float(recorded['drift']):.2g} % from those of the base"
        message = f"these deltas were trained on {trained_on}, which they are loaded on now; saving them forgets that"
        warnings.warn(message, stacklevel=3)
    return form


def refuse_quantized_checkpoint(config: Any, path: Path) -> None:
    """Raise E055 for a checkpoint that another tool has quantized."""
    given = config.get("quantization_config")
    if given is not None:
        method = given.get("quant_method", "another tool") if isinstance(given, dict) else "another tool"
        message = f"{path} is quantized already, by {method}; peftc quantizes a plain checkpoint while it is loaded"
        fail("E055", message, help='give the plain checkpoint, with `quantize="nf4"`, "int4" or "int8"')


def quantize(model: Any, form: str, trained: Collection[str]) -> None:
    """Quantize the linear layers of an adapted model in place, one at a time."""
    forms: dict[str, str] = {}
    changed = total = 0.0
    for path, module in _linears(model, trained):
        weight: torch.Tensor = module._parameters.pop("weight")
        data, scale = quantization.pack(weight, form)
        wide = weight.detach().double()
        changed += float((quantization.dequantize(data, scale, form, weight.dtype).double() - wide).square().sum())
        total += float(wide.square().sum())
        module.register_parameter("weight", torch.nn.Parameter(data, requires_grad=False))
        module.register_buffer(SCALE, scale)
        module.__dict__["_peftc_form"] = form
        module.__class__ = _holding(type(module))
        forms[f"{path}.weight"] = form
    model._quantized = Quantized(forms, (changed / total) ** 0.5 if total else 0.0)
    model._surgery.provenance["quantized"] = {"form": form, "drift": model._quantized.drift}


def _linears(model: Any, trained: Collection[str]) -> Iterator[tuple[str, Any]]:
    from transformers.pytorch_utils import Conv1D

    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in [*model.named_modules()]:
        own = type(module) in (torch.nn.Linear, Conv1D) and module is not model.get_output_embeddings()
        shared = own and names[id(module.weight)] > 1
        if own and not shared and f"{path}.weight" not in trained and quantization.packable(module.weight):
            yield path, module


@functools.cache
def _holding(own: type[torch.nn.Module]) -> type[Any]:
    """The class of a linear layer whose weight is quantized, for calls of the module by itself."""
    stored = "out" if issubclass(own, torch.nn.Linear) else "in"

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        scale = self._buffers[SCALE]
        return quantization.linear(x, self.weight, scale, self.bias, self.__dict__["_peftc_form"], stored)

    return type("Quantized" + own.__name__, (own,), {"forward": forward, "__module__": __name__})


def forms_of(model: Any) -> dict[str, str]:
    """The quantized parameters of a model, by name, and their forms."""
    held: Quantized | None = model.__dict__.get("_quantized")
    return {} if held is None else held.forms


def refuse_trained(model: Any, trained: Collection[str], name: str) -> None:
    """Raise E055 for a state with a tensor of its own for a weight that is quantized."""
    both = sorted(set(trained) & forms_of(model).keys())
    if both:
        message = f"the state `{name}` trains {both[0]}, which this model holds quantized"
        fail("E055", message, help="load the base without `quantize`")


def refuse_merge(delta: DeltaDir) -> None:
    """Raise E055 for deltas that were trained on rounded weights, which those of their base are not."""
    recorded = delta.manifest["base"].get("quantized")
    if recorded is not None:
        form, drift = recorded["form"], 100 * float(recorded["drift"])
        message = f"{delta.path} was trained on {form} weights, which differ from its base's by {drift:.2g} %"
        help = "write the weights that it was trained on: peftc.load(DIR).save_dequantized(BASE, DELTAS); merge DELTAS"
        fail("E055", message, help=help)


def save_dequantized(model: Any, base: Path, deltas: Path) -> None:
    """Write the rounded weights as a plain checkpoint, one tensor at a time, and the deltas as made on that.

    Raises `PeftcError` E030 to E036, E040, E055.
    """
    from peftc.runtime.api import base_reference
    from peftc.runtime.save import save_model, values_to_save
    from peftc.store.atomic import atomic_directory
    from peftc.store.keys import key_map
    from peftc.store.model_dir import CONFIG, WEIGHTS, ModelDir
    from peftc.store.safetensors_io import TensorSpec, dtype_code, write

    forms, surgery = forms_of(model), model.surgery
    if not forms:
        fail("E055", "this model's base is not quantized", help="save_pretrained saves its deltas")
    source = ModelDir.open(surgery.base_dir)
    names = key_map(model.skeleton().model, source.shapes()).state_to_checkpoint
    lost = sorted(forms.keys() - names.keys())
    if lost:
        message = f"{source.path} does not hold {lost[0]} as it is: transformers makes it while loading"
        fail("E055", message, help="save the base with transformers first, and apply the rule to that")
    rounded = {names[name]: name for name in forms}
    code = dtype_code(model.dtype)
    entries = [
        TensorSpec(name, code if name in rounded else info.dtype, info.shape)
        for name, (_, info) in source.tensors.items()
    ]

    def produce(name: str) -> torch.Tensor:
        return whole(model, rounded[name]).cpu() if name in rounded else source.read(name)

    with atomic_directory(base, replace=False) as fresh:
        source.copy_support_files(fresh)
        config = {**source.config, "dtype": str(model.dtype).removeprefix("torch.")}
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write(fresh / WEIGHTS, entries, produce, {"format": "pt"})
    given = surgery.provenance
    reference = base_reference(ModelDir.open(base), given["head"], given["num_labels"], given["seed"])
    values = values_to_save(model, None)
    model._surgery = replace(surgery, provenance=reference, base_dir=Path(base))
    try:
        save_model(model, Path(deltas), values)
    finally:
        model._surgery = surgery


def whole(model: Any, name: str) -> torch.Tensor:
    """A quantized weight as its layer reads it."""
    module = model.get_submodule(name.rpartition(".")[0])
    form = module.__dict__["_peftc_form"]
    return quantization.dequantize(module.weight, module._buffers[SCALE], form, model.dtype)
