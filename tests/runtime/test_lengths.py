"""A model whose code loops over the tokens is traced for each length, says so, and is right at each."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import peftc

RULE = """\
peftc: 1
name: linears
hyper: {r: 2}
deltas:
  lora: {at: linear, where: {role: other}, modify: out, insert: parallel, form: low_rank, compose: h + dh}
"""


@pytest.mark.slow
def test_a_scan_over_the_tokens_is_right_at_every_length(tmp_path: Path) -> None:
    sizes = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2, "pad_token_id": 1}
    base = MambaForCausalLM(MambaConfig(**sizes)).double().eval()
    base.save_pretrained(tmp_path)
    rule = tmp_path / "linears.yaml"
    rule.write_text(RULE)
    model = peftc.apply(rule, tmp_path, dtype=torch.float64)
    for length in (11, 4, 4):
        ids = torch.randint(2, 19, (2, length))
        told = pytest.warns(UserWarning, match="traced anew for each length of sequence: its code loops")
        with torch.no_grad(), contextlib.nullcontext() if length == 11 else told:
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert (found - base(input_ids=ids).logits).abs().max() <= 1e-10
    assert [program.fixed for program in model.surgery.programs.values()] == [{"sequence": 11}, {}]
