"""Tiny random BERT and Llama, a method of HF `peft` and the rule of the same name on each, and their differences."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import peftc
from peftc.fold.state import FoldedState
from peftc.lang.loader import parse_rule
from peftc.passes.fold import Fold
from peftc.runtime.graph_model import state_of

VOCABULARY = 64
WIDTH, HEADS, KV_HEADS, INNER = 32, 4, 2, 48
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "max_position_embeddings": 32,
}  # fmt: skip

Tensors = dict[str, Tensor]
Layers = Mapping[str, Any]
"""Layers of a peft model by the path that the base model has for them."""


def tiny(family: str) -> Any:
    """In float32, two layers, weights large enough to matter, no bias at zero and no norm at one."""
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**_SIZES))
    else:
        config = transformers.LlamaConfig(
            **_SIZES, num_key_value_heads=KV_HEADS, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.15 * noise)
    return model.eval()


def inputs() -> Tensors:
    """Three rows of 9, 6 and 3 tokens."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def output(model: Any) -> Tensor:
    """What the model says of the tokens that are not padding."""
    with torch.no_grad():
        return _output(model)


def _output(model: Any) -> Tensor:
    given = inputs()
    extra = {"use_cache": False} if hasattr(model, "lm_head") else {}
    return model.eval()(**given, **extra)[0][given["attention_mask"].bool()]


def gradients(model: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Of one and the same function of the output."""
    result = _output(model)
    weight = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    return list(torch.autograd.grad((result * weight).mean(), list(parameters)))


def scramble(parameters: Iterable[tuple[str, torch.nn.Parameter]], scale: float = 0.3) -> None:
    """Random values in place of what a method starts with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def peft_model(family: str, config: Any) -> Any:
    """`tiny` with a method of peft. Its start is random, and `scramble` adds to it, so the seed is set here."""
    import peft

    torch.manual_seed(4)
    return peft.get_peft_model(tiny(family), config).eval()


def apply_rule(rule: str, base: Path, values: Mapping[str, object]) -> Any:
    """The adapted model; `rule` is a name of the library or the text of a rule."""
    source = parse_rule(rule, "rule.yaml") if "\n" in rule else rule
    return peftc.apply(source, base, set=dict(values) or None)


def set_deltas(model: Any, values: Tensors) -> None:
    """Give every delta parameter its value; the names must be all of them."""
    assert set(values) == set(model.surgery.plan.parameters)
    with torch.no_grad():
        for name, value in values.items():
            parameter = model.get_parameter(name)
            assert parameter.shape == value.shape, f"{name} is {tuple(parameter.shape)}, not {tuple(value.shape)}"
            parameter.copy_(value)


@dataclass(frozen=True, slots=True)
class Folded:
    """What a fold makes of an adapted model: the result of each delta, and every tensor of the plain model."""

    results: set[str]
    reasons: set[str]
    state: FoldedState

    @classmethod
    def of(cls, model: Any) -> Folded:
        program = model.program_for(inputs())
        step = Fold()
        step.apply(program)
        decisions = step.decisions
        state = FoldedState(lambda name: state_of(model)[name].detach(), step.updates)
        return cls({d.result for d in decisions}, {d.reason for d in decisions if d.reason}, state)

    def into(self, base: Any) -> Any:
        """A plain model with the folded weights."""
        plain = copy.deepcopy(base)
        plain.load_state_dict({name: self.state(name) for name in plain.state_dict()})
        return plain


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    assert torch.isfinite(one).all()
    return float((one - other).detach().abs().max())


def layers(model: Any, kind: tuple[type, ...]) -> Layers:
    """The layers that peft has put into a model, by the paths of what they replace."""
    return {path.removeprefix("base_model.model."): m for path, m in model.named_modules() if isinstance(m, kind)}
