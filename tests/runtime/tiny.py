"""Tiny random models by name, and batches with real padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 99
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **SIZES}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=3, **SMALL))


def _bert_base() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SMALL, **TOKENS))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **TOKENS)
    return GPT2LMHeadModel(config)


def _bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        **SIZES,
        **TOKENS,
    )
    return BartForConditionalGeneration(config)


MAKERS = {"bert": _bert, "bert-base": _bert_base, "llama": _llama, "gpt2": _gpt2, "bart": _bart}


def moved(model: Any) -> Any:
    """The model with every trained tensor changed, so that no delta is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def batch(size: int = 3, length: int = 9) -> dict[str, Tensor]:
    """`size` rows of up to `length` tokens, padded at the right, each row shorter than the one before."""
    generator = torch.Generator().manual_seed(2)
    ends = torch.tensor([max(1, length - 2 * row) for row in range(size)])
    mask = (torch.arange(length) < ends[:, None]).long()
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def seq2seq_batch(size: int = 3, length: int = 9, target: int = 5) -> dict[str, Tensor]:
    return {**batch(size, length), "decoder_input_ids": batch(size, target)["input_ids"]}
