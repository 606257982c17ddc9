"""A model whose code loops over tokens, or chunks of them, is traced for further lengths, says so, and is right."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import peftc
from peftc.ir.guards import Guards

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


@pytest.mark.slow
def test_chunks_of_tokens_are_right_at_every_number_of_chunks(tmp_path: Path) -> None:
    """The trace of eleven tokens holds for two chunks of eight: of twenty there are three."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    more = {"num_attention_heads": 2, "num_key_value_heads": 2, "block_size": 8, "num_local_experts": 2}
    config = MiniMaxConfig(**sizes, **more, layer_types=["linear_attention"], pad_token_id=1)
    base = MiniMaxForCausalLM(config).eval()
    base.save_pretrained(tmp_path)
    rule = tmp_path / "linears.yaml"
    rule.write_text(RULE)
    model = peftc.apply(rule, tmp_path)
    for length in (11, 14, 20):
        ids = torch.randint(2, 19, (2, length))
        told = pytest.warns(UserWarning, match="traced anew for each length of sequence")
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad(), told if length == 20 else contextlib.nullcontext():
            found = model(**call).logits
        with torch.no_grad():
            assert (found - base(**call).logits).abs().max() <= 1e-5


def test_an_equation_of_sizes_tells_the_calls_that_break_it() -> None:
    import sympy

    tokens, rows = sympy.symbols("tokens rows", integer=True, positive=True)
    guards = Guards((sympy.Eq((tokens + 63) // 64, 1),), {tokens: "sequence", rows: "batch"})
    assert not guards.broken({"sequence": 64, "batch": 1})
    assert guards.broken({"sequence": 65, "batch": 1}) == {"sequence"}
    assert not guards.broken({"batch": 2}), "nothing is said of an axis that the call does not have"
