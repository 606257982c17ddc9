"""Prompt tuning written out as a rewrite of the model's taps is the same function as `compose: prepend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.harness import apply_rule, difference
from torch import Tensor
from torch.utils import _pytree as pytree

LONG = """
peftc: 1
name: prompt
hyper: {l: {default: 4, min: 1}}
rewrite:
  prompt:
    at: model
    params: {P: {shape: [l, d_model], init: uniform(0.5)}}
    let: {n: "size(ids, 0)"}
    set:
      ids:                 "concat(full([n, l], 0, like=ids), ids, dim=1)"
      mask?:               "concat(full([n, l], 1, like=mask), mask, dim=1)"
      types?:              "concat(full([n, l], 0, like=types), types, dim=1)"
      positions?:          "concat(expand(unsqueeze(range(l), 0), [n, l]), positions + l, dim=1)"
      labels?:             "concat(full([n, l], -100, like=labels), labels, dim=1)"
      embeddings:          "concat(expand(unsqueeze(P, 0), [n, l, d_model]), embeddings[:, l:], dim=1)"
      pooled?:             "pooled[:, l:]"
      outputs?:            "outputs[:, l:]"
      attentions?:         "attentions[:, :, l:, l:]"
      cross_attentions?:   "cross_attentions[:, :, :, l:]"
"""
SHORT = """
peftc: 1
name: prompt
hyper: {l: {default: 4, min: 1}}
deltas:
  prompt: {at: model, modify: embeddings, insert: sequential, form: prompt, compose: prepend}
"""
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip


def encoder(cls: type[Any]) -> Any:
    return cls(transformers.BertConfig(**_SIZES))


def decoder(cls: type[Any]) -> Any:
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return cls(config)


def both(cls: type[Any]) -> Any:
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    return cls(config)


IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
LEFT = MASK.flip(1)
LABELS = torch.where(MASK.bool(), IDS % 2, -100)
STATES = {"output_hidden_states": True, "output_attentions": True}
CASES: dict[str, tuple[Any, type[Any], dict[str, Any], tuple[str, ...]]] = {
    "a pooler": (encoder, transformers.BertModel,
                 {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": (IDS > 9).long(), **STATES},
                 ("ids", "mask", "types", "embeddings", "pooled", "outputs", "attentions")),
    "labels of tokens": (encoder, transformers.BertForTokenClassification,
                         {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS},
                         ("ids", "mask", "labels", "embeddings", "outputs")),
    "a decoder with padding": (decoder, transformers.LlamaForCausalLM,
                               {"input_ids": IDS, "attention_mask": LEFT, "labels": IDS, **STATES},
                               ("ids", "mask", "labels", "embeddings", "outputs", "attentions")),
    "positions": (decoder, transformers.LlamaForCausalLM,
                  {"input_ids": IDS, "attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)},
                  ("ids", "mask", "positions", "embeddings", "outputs")),
    "an encoder-decoder": (both, transformers.BartForConditionalGeneration,
                           {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5], **STATES},
                           ("ids", "mask", "embeddings", "outputs", "attentions", "cross_attentions")),
}  # fmt: skip


def save(model: Any, directory: Path) -> None:
    """With the choice of attention that returns its weights, which a saved config leaves out."""
    model.save_pretrained(directory)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attn_implementation": "eager"}))


def run(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """Every output, and the gradient of the prompt by one function of them."""
    outputs = [t for t in pytree.tree_leaves(model.eval()(**given).to_tuple()) if isinstance(t, torch.Tensor)]
    total = sum((t * torch.linspace(-1, 1, t.numel()).reshape(t.shape)).mean() for t in outputs)
    (gradient,) = torch.autograd.grad(total, [model.get_parameter("peftc.prompt.P")])
    return [*outputs, gradient]


QUICK = ("a pooler", "positions")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_the_long_form_is_the_shorthand(name: str, tmp_path: Path) -> None:
    make, cls, given, taps = CASES[name]
    torch.manual_seed(0)
    save(make(cls), tmp_path)
    long, short = (apply_rule(text, tmp_path, {}) for text in (LONG, SHORT))
    with torch.no_grad():
        for model in (long, short):
            model.get_parameter("peftc.prompt.P").copy_(torch.linspace(-1, 1, 4 * 32).reshape(4, 32))
    one, other = run(long, given), run(short, given)
    tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
    flags = {key: value for key, value in given.items() if not isinstance(value, torch.Tensor)}
    written = {entry.tap for entry in long.program_for(tensors, flags).ledger}
    assert written == set(taps), written ^ set(taps)
    assert len(one) == len(other)
    assert max(difference(a, b) for a, b in zip(one, other, strict=True)) <= 1e-6
    assert float(one[-1].abs().max()) > 1e-6


def test_a_prompt_beyond_the_models_positions_is_told_at_the_inputs(tmp_path: Path) -> None:
    from peftc.diagnostics import PeftcError

    save(encoder(transformers.BertModel), tmp_path)
    with pytest.raises(PeftcError) as raised:
        apply_rule(LONG.replace("default: 4", "default: 40"), tmp_path, {})
    (found,) = raised.value.diagnostics
    assert found.code == "E024"
    assert "takes no sequence of this length" in found.message
