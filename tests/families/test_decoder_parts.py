"""Decoders whose parts lie otherwise: one key for all heads in a fused projection, a scan that writes into zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peftc
from families.family import randomised
from peftc.lang.loader import parse_rule

IDS = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(0))
"""As long as a trace's sample: a loop over the tokens is written out for that length."""


def adapted(model: Any, rule: Any, directory: Path) -> Any:
    """The model with the rule on it, deltas filled with noise, in float64 and evaluation mode."""
    randomised(model).save_pretrained(directory)
    found = peftc.apply(rule, directory, set={"r": 3}).double().eval()
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(found.named_parameters()):
            if ".peftc." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise))
    return found


def deltas(model: Any, path: str) -> dict[str, Tensor]:
    start = f"{path}.peftc.lora."
    return {name.removeprefix(start): p for name, p in model.named_parameters() if name.startswith(start)}


def test_lora_on_q_and_v_of_multi_query_attention_equals_it_by_hand(tmp_path: Path) -> None:
    config = transformers.GPTBigCodeConfig(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, multi_query=True, pad_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    plain = transformers.GPTBigCodeForCausalLM(config)
    found = adapted(plain, "lora", tmp_path)
    plain = plain.double().eval()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for layer in range(2):
            own = deltas(found, f"transformer.h.{layer}.attn")
            assert {n: p.shape for n, p in own.items() if n.endswith("B")} == {"q.B": (32, 3), "v.B": (8, 3)}
            module = plain.transformer.h[layer].attn.c_attn
            scale = 16 / 3  # alpha / r of the rule

            def with_lora(x: Tensor, forward: Any = module.forward, own: Any = own, scale: float = scale) -> Tensor:
                q, k, v = forward(x).split((32, 8, 8), -1)
                q = q + scale * (x @ own["q.A"].T) @ own["q.B"].T
                return torch.cat([q, k, v + scale * (x @ own["v.A"].T) @ own["v.B"].T], -1)

            patch.setattr(module, "forward", with_lora)
        expected = plain(input_ids=IDS).logits
        answer = found(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert (answer - expected).abs().max() <= 1e-12 * expected.abs().max()


SCANS = {
    "rwkv": (
        transformers.RwkvForCausalLM,
        {"vocab_size": 40, "context_length": 16, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16},
        "rwkv.blocks.0.attention.key",
    ),
    "recurrent_gemma": (
        transformers.RecurrentGemmaForCausalLM,
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "lru_width": 16,
         "num_attention_heads": 2, "block_types": ["recurrent"], "pad_token_id": 0},
        "model.layers.0.temporal_block.linear_x",
    ),
}  # fmt: skip
"""A class, a small config, and the linear layer whose result a scan writes, token by token, into zeros."""


ROW = """\
peftc: 1
name: one
hyper: {r: 3}
deltas:
  lora: {at: linear, modify: out, insert: parallel, form: low_rank, compose: h + dh, where: {path: PATH}}
"""


@pytest.mark.parametrize("name", SCANS)
def test_a_delta_before_a_scan_that_writes_in_place_gets_its_gradient(name: str, tmp_path: Path) -> None:
    cls, sizes, path = SCANS[name]
    rule = parse_rule(ROW.replace("PATH", path), "one.yaml")
    plain = cls(cls.config_class(**sizes, bos_token_id=1, eos_token_id=2))
    found = adapted(plain, rule, tmp_path)
    own = deltas(found, path)
    plain = plain.double().eval()
    by_hand = {n: p.detach().clone().requires_grad_() for n, p in own.items()}
    module = plain.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: forward(x) + (x @ by_hand["A"].T) @ by_hand["B"].T
    expected = plain(input_ids=IDS, use_cache=False).logits
    answer = found(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert (answer - expected).abs().max() <= 1e-9 * expected.abs().max()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (expected * weights).sum().backward()
    (answer * weights).sum().backward()
    for key, parameter in own.items():
        wanted: Any = by_hand[key].grad
        assert wanted.abs().max() > 0
        assert (parameter.grad - wanted).abs().max() <= 1e-9 * wanted.abs().max(), key
