"""Where a cache would be wrong there is none: `generate` says why, and computes every token from the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from generation.conftest import Make, prompts
from generation.reference import greedy
from peftc.diagnostics import PeftcError
from peftc.runtime.generation import uncached

NEW = 5
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def test_a_prompt_generates_without_a_cache_and_says_why(made: Make) -> None:
    subject, given = made("llama", "prompt"), prompts(2)
    with pytest.warns(UserWarning, match=r"without a cache: .*delta `prompt` makes the sequence longer"):
        found = subject.model.generate(**given, **OPTIONS)
    assert torch.equal(found, greedy(subject, given, NEW))
    with pytest.raises(PeftcError, match=r"E041 error: `use_cache`: .*delta `prompt` makes the sequence longer"):
        subject.model.generate(**given, **OPTIONS, use_cache=True)
    with pytest.raises(PeftcError, match=r"E041 error: .*delta `prompt` makes the sequence longer"):
        subject.model(**given, use_cache=True)


@pytest.mark.slow
def test_a_model_whose_state_is_no_keys_and_values_says_that_it_keeps_no_cache(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    rule = tmp_path / "rule.yaml"
    row = "{at: linear, modify: out, insert: parallel, form: low_rank, compose: h + dh}"
    rule.write_text(f"peftc: 1\nname: linears\nhyper: {{r: 4, alpha: 8}}\ndeltas:\n  lora: {row}\n")
    model = peftc.apply(rule, tmp_path)
    reason = uncached(model)
    assert reason is not None and "an adapted MambaForCausalLM keeps no cache" in reason


def test_a_carried_value_that_sums_along_the_sequence_is_told_by_its_op(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(tmp_path)
    rule = tmp_path / "rule.yaml"
    rule.write_text(
        "peftc: 1\n"
        "name: sums\n"
        "carry: {z: {at: block, value: 'cumsum(x, dim=-2)'}}\n"
        "deltas:\n"
        "  read: {at: block, modify: out, from: {z: z}, params: {g: {shape: [d_out], init: zeros}}, form: g * z}\n"
    )
    reason = uncached(peftc.apply(rule, tmp_path))
    assert reason is not None
    assert reason.endswith("the carried value `z` looks beyond a token: its `cumsum` works along the sequence")


@pytest.mark.slow
def test_a_delta_that_sums_along_the_sequence_is_told_by_its_op(made: Make) -> None:
    with pytest.warns(UserWarning, match=r"delta `lora.q` looks beyond a token: its `mean` works along the sequence"):
        made("llama", "unipelt").model.generate(**prompts(1), **OPTIONS)


@pytest.mark.slow
def test_an_encoder_decoder_with_a_prompt_says_why_it_does_not_generate_and_what_does(made: Make) -> None:
    subject, ids = made("t5", "prompt"), prompts(2)
    given = {"input_ids": ids["input_ids"].flip(1), "attention_mask": ids["attention_mask"].flip(1)}
    with pytest.raises(PeftcError, match=r"E041 error: .*delta `prompt` makes the encoder's sequence longer") as told:
        subject.model.generate(**given, **OPTIONS, use_cache=False)
    assert "`decoder_input_ids` for each token" in str(told.value)
    with torch.no_grad():
        result = subject.model(**given, decoder_input_ids=torch.zeros((2, 1), dtype=torch.long))
    assert result.logits.shape[:2] == (2, 1)
