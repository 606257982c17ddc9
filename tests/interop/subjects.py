"""Tiny random models with every weight at work, adapters that PEFT makes and saves for them, and what both say."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_MADE: dict[str, Any] = {}


def model(family: str) -> Any:
    """A fresh copy in float64, two layers, no bias at zero and no norm at one."""
    if family not in _MADE:
        _MADE[family] = _scrambled(_new(family))
    return copy.deepcopy(_MADE[family])


def _new(family: str) -> Any:
    if family == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**_COMMON, num_labels=3))
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_COMMON, **_TOKENS, num_key_value_heads=2))
    if family == "mixtral":
        sizes = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_COMMON, **_TOKENS, **sizes))
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 40}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, pad_token_id=0, **_TOKENS, **sizes)
    )


def _scrambled(made: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scale else 0.15 * noise)
    return made.double().eval()


def inputs() -> dict[str, Tensor]:
    """Three rows of 9, 6 and 3 tokens."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def says(subject: Any) -> Tensor:
    """Its logits, those of padding left out; a prompt's own logits, which PEFT gives in front, too."""
    given = inputs()
    extra = {} if subject.config.model_type == "bert" else {"use_cache": False}
    found = subject(**given, **extra).logits
    return found if found.dim() == 2 else found[:, -given["input_ids"].shape[1] :][given["attention_mask"].bool()]


def slope(subject: Any, parameters: list[Tensor]) -> list[Tensor]:
    """The gradient of one and the same function of what it says."""
    found = says(subject)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
    return list(torch.autograd.grad((found * weight).mean(), parameters))


@dataclass(frozen=True, slots=True)
class Made:
    """A base and an adapter of PEFT's, on the disk and in memory; `model` runs what is on the disk."""

    family: str
    base: Path
    adapter: Path
    model: Any
    trained: dict[str, Tensor] = field(default_factory=dict)
    """The parameters that PEFT trains, by the names they are saved under."""


def made(family: str, config: Any, place: Path) -> Made:
    """Let PEFT make an adapter with random values, save it, and load it again; what it warns of is known here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _made(family, config, place)


def _made(family: str, config: Any, place: Path) -> Made:
    import peft

    base, adapter = place / "base", place / "adapter"
    model(family).save_pretrained(base)
    torch.manual_seed(4)
    fresh = peft.get_peft_model(model(family), config, autocast_adapter_dtype=False)
    fresh = fresh if config.is_prompt_learning else fresh.double()  # PEFT loads prompts in float32
    _randomize(fresh)
    fresh.save_pretrained(adapter)
    again = loaded(family, adapter)
    trained = {_key(name): value for name, value in again.named_parameters() if value.requires_grad}
    return Made(family, base, adapter, again, {} if config.is_prompt_learning else trained)


def loaded(family: str, adapter: Path) -> Any:
    """The model with an adapter of a directory, as PEFT loads it; it trains where PEFT lets a loaded one."""
    import peft

    config = peft.PeftConfig.from_pretrained(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.PeftModel.from_pretrained(
            model(family), adapter, is_trainable=not config.is_prompt_learning, autocast_adapter_dtype=False
        )
    return found.double().eval()


def _randomize(subject: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (parameter for parameter in subject.parameters() if parameter.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def _key(name: str) -> str:
    name = name.replace(".default", "").replace(".modules_to_save", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
