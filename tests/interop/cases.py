"""Adapters of PEFT, by method: the configuration that makes one on each family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("bert", "llama", "gpt2")
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
TASK = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
EMBEDDING = {"bert": "word_embeddings", "llama": "embed_tokens", "gpt2": "wte"}
NORM = {"bert": "output.LayerNorm", "llama": "input_layernorm", "gpt2": "ln_1"}
FEEDFORWARD = {"bert": "intermediate.dense", "llama": "down_proj", "gpt2": "mlp.c_proj"}
LAST = {"bert": "pooler.dense", "llama": "norm", "gpt2": "ln_f"}
NOT_CONV1D = ("bert", "llama")
"""PEFT has not every method for GPT-2's Conv1D."""
DECODERS = ("llama", "gpt2")


@dataclass(frozen=True, slots=True)
class Case:
    """A method with options: `configure(family)` gives PEFT's configuration."""

    configure: Callable[[str], Any]
    families: tuple[str, ...] = FAMILIES
    unmerged: tuple[str, ...] = ()
    """Where a plain checkpoint cannot hold it: a bias of a layer without, one of two tied weights, a prompt."""


def _of(name: str, targets: Callable[[str], Any] = TARGETS.__getitem__, **options: Any) -> Callable[[str], Any]:
    def configure(family: str) -> Any:
        import peft

        return getattr(peft, name)(task_type=TASK[family], target_modules=targets(family), **options)

    return configure


def _virtual(name: str, **options: Any) -> Callable[[str], Any]:
    def configure(family: str) -> Any:
        import peft

        return getattr(peft, name)(task_type=TASK[family], num_virtual_tokens=5, **options)

    return configure


def _lora(**options: Any) -> Callable[[str], Any]:
    return _of("LoraConfig", r=4, lora_alpha=6, **options)


def _patterns(family: str) -> Any:
    first, second = TARGETS[family]
    layer = {"bert": "layer.0", "llama": "layers.0", "gpt2": "h.0"}[family]
    rank = {second: 2}
    alpha = {rf"^.*{layer}.*{second}": 5, first: 3}
    return _lora(rank_pattern=rank, alpha_pattern=alpha)(family)


def _saving(family: str) -> Any:
    return _lora(modules_to_save=[LAST[family]])(family)


def _embeddings(family: str) -> Any:
    return _of("LoraConfig", lambda f: [*TARGETS[f], EMBEDDING[f]], r=4, lora_alpha=6)(family)


def _ia3(family: str) -> Any:
    inner = FEEDFORWARD[family]
    return _of("IA3Config", lambda f: [TARGETS[f][0], inner], feedforward_modules=[inner])(family)


CASES: Mapping[str, Case] = {
    "LoRA": Case(_lora()),
    "LoRA, rank and alpha patterns": Case(_patterns),
    "rsLoRA": Case(_lora(use_rslora=True)),
    "LoRA with its own bias": Case(_lora(lora_bias=True), unmerged=("llama",)),
    "LoRA, every bias trained": Case(_lora(bias="all"), ("bert", "gpt2")),
    "LoRA, biases of its layers trained": Case(_lora(bias="lora_only"), ("bert", "gpt2")),
    "LoRA on the embedding": Case(_embeddings, unmerged=("gpt2",)),
    "LoRA, modules_to_save": Case(_saving),
    "LoRA and trainable tokens": Case(_lora(trainable_token_indices=[5, 3, 60]), unmerged=("gpt2",)),
    "trainable tokens": Case(
        _of("TrainableTokensConfig", lambda f: [EMBEDDING[f]], token_indices=[5, 3, 60]), unmerged=("gpt2",)
    ),
    "DoRA": Case(_lora(use_dora=True)),
    "(IA)3": Case(_ia3),
    "LayerNorm tuning": Case(_of("LNTuningConfig", lambda f: [NORM[f]])),
    "LoHa": Case(_of("LoHaConfig", r=4, alpha=6), NOT_CONV1D),
    "LoKr": Case(_of("LoKrConfig", r=2, alpha=6), NOT_CONV1D),
    "LoKr, full second factor": Case(_of("LoKrConfig", r=16, alpha=6), NOT_CONV1D),
    "LoKr, both decomposed": Case(_of("LoKrConfig", r=1, alpha=6, decompose_both=True), NOT_CONV1D),
    "VeRA": Case(_of("VeraConfig", r=4)),
    "OFT": Case(_of("OFTConfig", r=0, oft_block_size=8), NOT_CONV1D),
    "OFT, exact Cayley transform": Case(_of("OFTConfig", r=0, oft_block_size=8, use_cayley_neumann=False), NOT_CONV1D),
    "prompt tuning": Case(_virtual("PromptTuningConfig"), DECODERS, unmerged=DECODERS),
    "p-tuning": Case(_virtual("PromptEncoderConfig", encoder_hidden_size=8), DECODERS, unmerged=DECODERS),
}
