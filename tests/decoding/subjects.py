"""The decoders of transformers, each with a head that writes text, and how one is built small with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftc.frontend.inputs import InputSpec, default_inputs
from peftc.frontend.trace import Skeleton, build_skeleton
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.lang.loader import load_rule
from peftc.pipeline import rewrite
from peftc.runtime.graph_model import Surgery, attach
from peftc.runtime.init import Initializer
from peftc.runtime.state import state_of
from peftc.store.heads import resolve

HEADS = ("causal-lm", "seq2seq-lm", "speech-seq2seq", "image-text-to-text")
LARGEST = 30_000_000
"""Parameters of a model that is still run; a larger one (it could not be made small) is left out with that reason."""

LINEARS = str(Path(__file__).with_name("linears.yaml"))


def every_decoder() -> list[tuple[str, str]]:
    """Model type and head: each head that writes text, but one of several that read text and image or sound."""
    from transformers.models.auto import modeling_auto as auto

    causal, seq2seq = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    found = [(family, "causal-lm") for family in causal]
    found += [(family, "seq2seq-lm") for family in seq2seq if family not in causal or seq2seq[family] != causal[family]]
    known = {family for family, _ in found}
    for names, head in (
        (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "speech-seq2seq"),
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "image-text-to-text"),
    ):
        found += [(family, head) for family in names if family not in known]
        known |= set(names)
    return found


def config_of(raw: dict[str, Any], head: str) -> tuple[Any, Any]:
    """The class and the config of a small raw config. An encoder that may decode is told to."""
    raw = {**raw, "architectures": None}
    if head == "causal-lm" and raw.get("is_decoder") is False:
        raw["is_decoder"] = True
    return resolve(raw, f"family `{raw['model_type']}`", head)


def skeleton_of(raw: dict[str, Any], head: str, dtype: torch.dtype) -> Skeleton:
    cls, config = config_of(raw, head)
    return build_skeleton(cls, config, dtype)


def built(raw: dict[str, Any], head: str, dtype: torch.dtype) -> Any:
    """The model with noise everywhere, in evaluation mode: attention far from uniform, norms away from 1."""
    cls, config = config_of(raw, head)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scale else 0.15 * noise)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Traced:
    """A base and its located trace, from which adapted models are made."""

    base: Any
    skeleton: Skeleton
    inputs: dict[str, InputSpec]
    program: Program
    skeletons: dict[Any, Skeleton] = field(default_factory=dict)
    """Of all adapted models, so that they share traces."""
    layouts: dict[Any, Any] = field(default_factory=dict)

    def kinds(self) -> set[str]:
        return {site.kind for site in self.program.sites}

    def rounds(self) -> bool:
        """Whether a model in float64 computes something in float32."""
        values = [node.meta.get("val") for node in self.program.graph.nodes if node.op == "call_function"]
        return any(isinstance(value, torch.Tensor) and value.dtype is torch.float32 for value in values)

    def adapted(self, rule: str, hyper: dict[str, object]) -> Any:
        """A copy of the base with `rule` on it, deltas far from zero."""
        program = copied(self.program)
        plan = rewrite(program, load_rule(LINEARS if rule == "linears" else rule, hyper))
        model = copy.deepcopy(self.base)
        surgery = Surgery(plan.rule, plan, type(self.base), skeletons=self.skeletons, layouts=self.layouts)
        surgery.keep(model, self.inputs, self.skeleton, program)
        start = Initializer(plan.parameters, 0, state_of(model).__getitem__, saved=_nothing_saved)
        values = {name: start(name) for name in plan.parameters}
        adapted = attach(model, surgery, values).eval()
        generator = torch.Generator().manual_seed(4)
        for name in sorted(plan.parameters):
            noise = torch.randn(plan.parameters[name].shape, generator=generator)
            adapted.get_parameter(name).data.copy_(0.3 * noise)
        return adapted


def rules_for(kinds: set[str]) -> dict[str, dict[str, object]]:
    """The rules that are tried, by the kinds of sites that there are; where there is no attention, its linears."""
    if "attention" not in kinds:
        return {"linears": {}} if "linear" in kinds else {}
    if "ffn" not in kinds:
        return {"lora": {"r": 4}, "prefix": {"l": 3}}
    return {"lora": {"r": 4}, "mam": {"l": 3, "r": 5, "s": 2.0}, "houlsby": {"r": 5}}


def usual_inputs(skeleton: Skeleton) -> dict[str, InputSpec]:
    return default_inputs(skeleton.model)


def _nothing_saved(_: object) -> torch.Tensor:
    raise LookupError("the rule starts from saved deltas")
