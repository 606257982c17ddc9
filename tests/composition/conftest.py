"""Tiny random models of four layers on disk: a Llama, a BERT with gelu, a BART of two and three layers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.program import Program
from peftc.lang.rule import Rule
from peftc.pipeline import analyse
from peftc.planning.plan import Plan, make_plan

Planner = Callable[..., Plan]

SIZES = {"vocab_size": 64, "max_position_embeddings": 32}
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, **SIZES}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make(name: str) -> Any:
    if name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, **SMALL, **TOKENS)
        return transformers.LlamaForCausalLM(config)
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=2, **SIZES, **TOKENS,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model by name, in float64, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def find(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = make(name).double()
                for parameter in model.parameters():
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
                model.save_pretrained(root / name)
        return root / name

    return find


@pytest.fixture(scope="session")
def plan(directory: Callable[[str], Path]) -> Callable[..., Plan]:
    """Rule and name of a model -> the plan; a plan changes nothing, so a model is traced once."""
    programs: dict[str, Program] = {}

    def make_it(rule: Rule, name: str, **options: Any) -> Plan:
        if name not in programs:
            skeleton = build_skeleton(type(make(name)), transformers.AutoConfig.from_pretrained(directory(name)))
            programs[name] = analyse(skeleton, default_inputs(skeleton.model))
        return make_plan(rule, programs[name], **options)

    return make_it


def inputs() -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 3 tokens."""
    mask = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(2))
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def logits(model: Any) -> torch.Tensor:
    extra = {"use_cache": False} if "Llama" in type(model).__name__ else {}
    return model(**inputs(), **extra).logits


def scramble(model: Any) -> Any:
    """The model with random values in every trained tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def rendered(report: Any) -> str:
    """What a report prints."""
    text = io.StringIO()
    report.render(Console(file=text, width=200))
    return text.getvalue()
