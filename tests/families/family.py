"""The families: a tiny configuration each, the classes its sub-layers have, and which module plays which role."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN, LAYERS, HEADS, FFN, VOCABULARY = 32, 2, 4, 64, 99


@dataclass(frozen=True)
class Family:
    """`attention` and `ffn` name the classes of the modules that are one sub-layer each.

    `roles` and `ffn_roles` give, below such a module, the linear layer of each role. A path is matched against the
    module tree, so a locator that swaps roles or misses a layer cannot agree with it.
    """

    name: str
    model: str
    config: dict[str, Any]
    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    roles: dict[str, str]
    ffn_roles: dict[str, str]
    cross_roles: dict[str, str] = field(default_factory=dict)
    decoder: bool = False
    seq2seq: bool = False
    kv_heads: int = HEADS
    head_dim: int = HIDDEN // HEADS
    d_ff: int = FFN

    def build(self, **overrides: Any) -> Any:
        """The model with weights large enough for every path to matter, in evaluation mode."""
        import transformers

        cls = getattr(transformers, self.model)
        config = cls.config_class(**{**self.config, **overrides})
        torch.manual_seed(0)
        return randomised(cls(config))

    def attention_modules(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if type(module).__name__ in self.attention]

    def ffn_modules(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if type(module).__name__ in self.ffn]

    def is_cross(self, path: str) -> bool:
        return bool(re.search(r"encoder_attn|EncDecAttention", path))

    def stack(self, path: str) -> str:
        if self.seq2seq:
            return "decoder" if path.startswith(("decoder.", "model.decoder.")) else "encoder"
        return "decoder" if self.decoder else "encoder"

    def roles_of(self, path: str) -> dict[str, str]:
        return {**self.roles, **(self.cross_roles if self.is_cross(path) else {})}

    def inputs(
        self, *, padded: bool = True, lengths: tuple[int, ...] = (11, 7, 3), target: int = 6
    ) -> dict[str, Tensor]:
        """A batch with one row for each of `lengths`, padded on the right to the first."""
        generator = torch.Generator().manual_seed(2)
        if "image_size" in self.config:
            size = self.config["image_size"]
            return {"pixel_values": torch.randn(len(lengths), 3, size, size, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (len(lengths), lengths[0]), generator=generator)
        inputs = {"input_ids": ids}
        if padded:
            mask = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]
            inputs = {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}
        if self.seq2seq:
            inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (len(lengths), target), generator=generator)
        return inputs


def layer_of(path: str) -> int:
    """The first number in a module path: transformer layers are the outermost lists."""
    found = re.search(r"\.(\d+)(\.|$)", path)
    assert found is not None
    return int(found.group(1))


def randomised(model: Any) -> Any:
    """Noise everywhere: attention far from uniform, biases and norms away from 0 and 1. Tied weights stay tied."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scale else 0.15 * noise)
    return model.eval()


def fill(model: nn.Module) -> dict[str, nn.Parameter]:
    """The delta parameters by name, filled with noise so that none is at its zero start."""
    deltas = {name: p for name, p in model.named_parameters() if ".peftc." in f".{name}"}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in sorted(deltas):
            noise = torch.randn(deltas[name].shape, generator=generator, dtype=torch.float64)
            deltas[name].copy_(0.1 * noise)
    return deltas


_SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": FFN,
}  # fmt: skip
_TEXT = {**_COMMON, **_SPECIAL}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_BERT = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
_BERT_FFN = {"up": "intermediate.dense", "down": "output.dense"}
_LLAMA = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_OPT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

FAMILIES = (
    Family("bert", "BertForSequenceClassification", _TEXT, ("BertAttention",), ("BertLayer",), _BERT, _BERT_FFN),
    Family(
        "roberta", "RobertaForSequenceClassification", _TEXT, ("RobertaAttention",), ("RobertaLayer",), _BERT, _BERT_FFN
    ),
    Family(
        "distilbert",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FFN, **_SPECIAL},
        ("DistilBertSelfAttention",),
        ("FFN",),
        {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"},
        {"up": "lin1", "down": "lin2"},
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, **_SPECIAL},
        ("GPT2Attention",),
        ("GPT2MLP",),
        {"qkv": "c_attn", "o": "c_proj"},
        {"up": "c_fc", "down": "c_proj"},
        decoder=True,
        d_ff=4 * HIDDEN,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        {**_TEXT, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN},
        ("OPTAttention",),
        ("OPTDecoderLayer",),
        _OPT,
        {"up": "fc1", "down": "fc2"},
        decoder=True,
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, **_SPECIAL},
        ("BloomAttention",),
        ("BloomMLP",),
        {"qkv": "query_key_value", "o": "dense"},
        {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
        decoder=True,
        d_ff=4 * HIDDEN,
    ),
    Family(
        "llama", "LlamaForCausalLM", _GROUPED, ("LlamaAttention",), ("LlamaMLP",), _LLAMA, _GATED,
        decoder=True, kv_heads=2,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_GROUPED, "head_dim": 16},
        ("Qwen3Attention",),
        ("Qwen3MLP",),
        _LLAMA,
        _GATED,
        decoder=True,
        kv_heads=2,
        head_dim=16,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        _GROUPED,
        ("Phi3Attention",),
        ("Phi3MLP",),
        {"qkv": "qkv_proj", "o": "o_proj"},
        {"gate_up": "gate_up_proj", "down": "down_proj"},
        decoder=True,
        kv_heads=2,
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": FFN, "num_layers": LAYERS,
            "num_heads": HEADS, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
        },
        ("T5Attention",),
        ("T5DenseActDense",),
        {"q": "q", "k": "k", "v": "v", "o": "o"},
        {"up": "wi", "down": "wo"},
        seq2seq=True,
    ),
    Family(
        "bart",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FFN,
            "decoder_ffn_dim": FFN, "max_position_embeddings": 40, "decoder_start_token_id": 2,
            "forced_eos_token_id": 2, **_SPECIAL,
        },
        ("BartAttention",),
        ("BartEncoderLayer", "BartDecoderLayer"),
        _OPT,
        {"up": "fc1", "down": "fc2"},
        seq2seq=True,
    ),
    Family(
        "vit",
        "ViTForImageClassification",
        {
            "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN,
            "image_size": 32, "patch_size": 8,
        },
        ("ViTAttention",),
        ("ViTMLP",),
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
        {"up": "fc1", "down": "fc2"},
    ),
)  # fmt: skip

MORE = (
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 0.5},
        ("Gemma2Attention",),
        ("Gemma2MLP",),
        _LLAMA,
        _GATED,
        decoder=True,
        kv_heads=2,
    ),
    Family(
        "mpnet",
        "MPNetForSequenceClassification",
        _TEXT,
        ("MPNetSelfAttention",),
        ("MPNetLayer",),
        {"q": "q", "k": "k", "v": "v", "o": "o"},
        _BERT_FFN,
    ),
)
"""Families whose attention is odd and always spelled out: a soft cap on the scores, a bias added in place."""
BY_NAME = {family.name: family for family in (*FAMILIES, *MORE)}


@contextlib.contextmanager
def softmax_keeps_float64() -> Iterator[None]:
    """BLOOM, and models whose attention is spelled out, run their softmax in float32 in any dtype; not in here."""
    original = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield
