"""The Python API: `peftc.apply` grafts a rule into a pretrained model, `peftc.load` opens a delta directory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.diagnostics import PeftcError, fail
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.lang.loader import load_rule
from peftc.pipeline import analyse, rewrite
from peftc.runtime.delta_dir import DeltaDir, check_names
from peftc.runtime.graph_model import Surgery, attach
from peftc.runtime.init import Initializer
from peftc.runtime.quantized import OFF, check_form, refuse_quantized_checkpoint
from peftc.runtime.quantized import quantize as quantize_base
from peftc.runtime.saved import SavedDeltas
from peftc.runtime.state import state_of
from peftc.store.fingerprint import sample_digests
from peftc.store.heads import resolve
from peftc.store.keys import key_map
from peftc.store.model_dir import ModelDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftc.frontend.trace import Skeleton
    from peftc.lang.rule import Rule
    from peftc.store.fingerprint import Fingerprint

__all__ = ["PeftcError", "apply", "load"]


def apply(
    rule: str | Path | Rule,
    model_dir: str | Path,
    set: Mapping[str, object] | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """Load the model at `model_dir` and graft `rule` into it; returns an instance of the model's own class.

    `set` changes hyperparameters of the rule, `head` and `num_labels` choose the model class as on the command line,
    `dtype` is the base's (default: as stored), `device` where the model goes (default: the CPU). Deltas start as the
    rule says, from `seed`, and so does a head that the checkpoint does not hold. `quantize` ("int8", "int4", "nf4")
    holds the base's linear layers in few bits; see `peftc.runtime.quantized`. Raises `PeftcError`.
    """
    form = check_form(quantize)
    resolved = rule if not isinstance(rule, (str, Path)) else load_rule(rule, set)
    base = ModelDir.open(model_dir)
    base.refuse_adapted()
    base.require_weights()
    saved = SavedDeltas(base)
    saved.check(resolved)
    model, cls = load_base(base, head, num_labels, seed, dtype)
    surgery = operate(model, cls, resolved, base_reference(base, head, num_labels, seed), base)
    start = Initializer(surgery.plan.parameters, seed, state_of(model).__getitem__, saved)
    values = {name: start(name) for name in surgery.plan.parameters}
    return _finished(attach(model, surgery, values).eval(), form, device)


def _finished(model: Any, form: str, device: str | torch.device | None) -> Any:
    if form != OFF:
        quantize_base(model, form, model.surgery.plan.trained)
    return model if device is None else model.to(device)


def load(
    directory: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """The adapted model of a delta directory, as it was saved; `base` says where the base model is if it has moved.

    `dtype` and `device` are as for `apply`, and `quantize` too: by default the base is as it was when the deltas were
    saved, and "off" leaves it whole. Raises `PeftcError`: E034 (not a delta directory), E035 (another base),
    E040 (tensors and rule differ).
    """
    delta = DeltaDir.open(directory)
    form = check_form(quantize, delta.manifest["base"].get("quantized"))
    source = ModelDir.open(delta.base_dir(base))
    source.refuse_adapted()
    source.require_weights()
    check_fingerprint(delta, source)
    reference = delta.manifest["base"]
    model, cls = load_base(source, reference["head"], reference["num_labels"], reference["seed"], dtype)
    provenance = base_reference(source, reference["head"], reference["num_labels"], reference["seed"])
    surgery = operate(model, cls, delta.rule, provenance, source)
    plan, values = surgery.plan, delta.tensors()
    check_names(
        delta.path,
        delta.header.tensors,
        {name: parameter.shape for name, parameter in plan.parameters.items()},
        {name: tuple(model.get_parameter(name).shape) for name in plan.trained},
    )
    adapted: Any = attach(model, surgery, values)
    with torch.no_grad():
        for name in (name for name in plan.trained if name in values):
            adapted.get_parameter(name).copy_(values[name])
    return _finished(adapted.eval(), form, device)


def load_base(
    base: ModelDir, head: str | None, num_labels: int | None, seed: int, dtype: torch.dtype | None = None
) -> tuple[Any, type[PreTrainedModel]]:
    """The base model with its weights, and its class; a head that is not stored starts from `seed`."""
    refuse_quantized_checkpoint(base.config, base.path)
    cls, config = resolve(base.config, base.path, head, num_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _quiet():
            model = cls.from_pretrained(base.path, config=config, dtype=dtype or "auto", ignore_mismatched_sizes=True)
    return model, cls


def _quiet() -> Any:
    """transformers reports every tensor it had to start anew; peftc says that in its own report."""
    from peftc.frontend.trace import quiet

    return quiet()


def new_parameters(base: ModelDir, skeleton: Skeleton) -> frozenset[str]:
    """Parameters of the model that its checkpoint does not hold, or holds in another shape: a new head."""
    if not base.has_weights:
        return frozenset()
    names = key_map(skeleton.model, base.shapes())
    parameters = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    return frozenset(parameters & {*names.missing, *names.mismatched})


def operate(model: Any, cls: type[PreTrainedModel], rule: Rule, provenance: dict[str, Any], base: ModelDir) -> Surgery:
    """Trace the model for its usual inputs, rewrite the graph by `rule`, and keep both for the first calls."""
    skeleton = build_skeleton(cls, copy.deepcopy(model.config), model.dtype)
    inputs = default_inputs(skeleton.model)
    program = analyse(skeleton, inputs)
    plan = rewrite(program, rule, fresh=new_parameters(base, skeleton))
    surgery = Surgery(plan.rule, plan, cls, provenance, base.path)
    surgery.keep(model, inputs, skeleton, program)
    return surgery


def base_reference(base: ModelDir, head: str | None, num_labels: int | None, seed: int) -> dict[str, Any]:
    """What a delta directory records about its base."""
    return {
        "path": str(base.path.resolve()),
        "fingerprint": base.fingerprint(),
        "parts": base.fingerprint_parts().to_json(),
        "samples": sample_digests(base.tensors),
        "head": head,
        "num_labels": num_labels,
        "seed": seed,
    }


def check_fingerprint(delta: DeltaDir, base: ModelDir) -> None:
    """Refuse a base other than the one the delta was made on. Raises `PeftcError` E035."""
    refuse_other_base(delta, base.fingerprint_parts(), base.path, lambda: _which_differ(delta, base))


def _which_differ(delta: DeltaDir, base: ModelDir) -> str:
    """The tensors of a base that are not those the delta was made on, and their files; "" where that is not known."""
    known = delta.manifest["base"].get("samples")
    if not isinstance(known, dict):
        return ""
    names = [name for name, digest in sample_digests(base.tensors).items() if known.get(name) != digest]
    if not names:
        return ""
    files = dict.fromkeys(base.tensors[name][0].path.name for name in names)
    more = f" and {len(names) - 1} more of {len(base.tensors)}" if len(names) > 1 else ""
    return f", {names[0]}{more}, in {', '.join(list(files)[:3])}{', ...' if len(files) > 3 else ''}"


def refuse_other_base(
    delta: DeltaDir, base: Fingerprint, path: str | Path, which: Callable[[], str] | None = None
) -> None:
    """Refuse a base, whose fingerprint this is, other than the one the delta was made on; `which` names its tensors
    that differ. Raises `PeftcError` E035."""
    from peftc.store.fingerprint import Fingerprint

    parts = delta.manifest["base"]["parts"]
    if not isinstance(parts.get("config"), str):
        fail("E034", f"{delta.path} does not say which base it was made on", help="apply the rule again")
    differences = Fingerprint.from_json(parts).differences(base)
    if differences:
        named = which() if which is not None and "the contents of tensors" in differences else ""
        fail(
            "E035",
            f"{path} is not the base that {delta.path} was made on: they differ in {' and '.join(differences)}{named}",
            help="give the right base with --base, or apply the rule to this one"
            + ("; where it should be the right one, its file is damaged: download it again" if named else ""),
        )
