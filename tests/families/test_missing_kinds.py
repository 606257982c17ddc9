"""A rule for a kind of site that the model lacks: told with what it has, where the form fits, and which rules do.

Mamba has no attention and no FFN, ConvNeXt no attention, Llama no mixture of experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import transformers

from peftc.checking.families import traced
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.lang.loader import list_rules, load_rule, parse_rule
from peftc.pipeline import analyse, rewrite
from peftc.planning.nearest import applies, nearest_rules


@lru_cache
def mamba() -> Program:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=4, time_step_rank=4
    )
    skeleton = build_skeleton(transformers.MambaForCausalLM, config, torch.float32)
    return analyse(skeleton, default_inputs(skeleton.model))


@lru_cache
def convnext() -> Program:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
    skeleton = build_skeleton(transformers.ConvNextForImageClassification, config, torch.float32)
    return analyse(skeleton, default_inputs(skeleton.model))


def told(rule: str, program: Program) -> list[Diagnostic]:
    with pytest.raises(PeftcError) as raised:
        rewrite(copied(program), load_rule(rule))
    return list(raised.value.diagnostics)


def test_a_model_without_attention_and_ffn_says_what_it_has() -> None:
    prefix, adapter = told("mam", mamba())
    assert prefix.render() == (
        "E020 error: delta `prefix` matches nothing: this model has no attention site\n"
        "   --> rules/mam.yaml:13:17\n"
        "    |\n"
        "13  |   prefix:  {at: attention, modify: heads, insert: parallel, form: prefix,     compose: gate}\n"
        "    |                 ^^^^^^^^^\n"
        f"   = help: it has: {MAMBA}; rules of the library that apply: norm_tuning, trainable_tokens"
    )
    assert adapter.message == "delta `adapter` matches nothing: this model has no ffn site"
    assert adapter.help == (
        f"it has: {MAMBA}; this form fits `at: linear, modify: out`; "
        "rules of the library that apply: norm_tuning, trainable_tokens"
    )


MAMBA = "9 linear (x, out, weight), 1 embedding (out, weight), 3 norm (x, out, weight), 2 block"


def test_what_the_model_has_is_counted_as_its_modules_are() -> None:
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
        )
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert f"{len(linears)} linear" in MAMBA


def test_rules_with_the_form_of_the_refused_one_come_first() -> None:
    (lora,) = told("lora", convnext())
    assert (lora.help or "").endswith(
        "this form fits `at: linear, modify: out`; rules of the library that apply: lora_ffn, lora_linear, compacter"
    )
    (experts,) = told("experts_lora", traced("decoder").located)
    assert "it has: 2 attention (x, ctx, q, k, v, heads, concat, out), 2 ffn (x, gate, up, mid, out, residual), " in (
        experts.help or ""
    )
    assert (experts.help or "").endswith("rules of the library that apply: lora, lora_linear, moe_lora")


@pytest.mark.parametrize("made", [mamba, convnext])
def test_rules_that_are_said_to_apply_do(made: Callable[[], Program]) -> None:
    program = made()
    names = {name for rule in ("mam", "lora", "ia3") for name in nearest_rules(load_rule(rule), program.sites)}
    assert len(names) >= 2
    for name in names:
        assert rewrite(copied(program), load_rule(name)).edits


def test_a_form_that_is_said_to_fit_a_linear_layer_does() -> None:
    rule = parse_rule(
        "peftc: 1\nname: t\nhyper: {r: 2}\ndeltas: {a: {at: linear, modify: out, form: bottleneck}}\n", "t"
    )
    assert len(rewrite(copied(mamba()), rule).edits) == 9


def test_a_rule_that_waits_for_a_stored_delta_is_not_offered() -> None:
    sites = traced("encoder").located.sites
    waiting = [rule.name for rule in list_rules() if any(delta.places for delta in rule.deltas)]
    assert "adapter_fusion" in waiting
    assert not any(applies(load_rule(name), sites) for name in waiting)
    assert applies(load_rule("mam"), sites) and not applies(load_rule("experts_lora"), sites)


@pytest.mark.parametrize("form", ["gain", "prefix", "bottleneck_heads"])
def test_a_form_that_reads_more_than_a_linear_layer_has_is_not_offered_there(form: str) -> None:
    heads = {"gain": '"h * heads"', "prefix": "prefix", "bottleneck_heads": "bottleneck_heads"}[form]
    row = f"a: {{at: attention, modify: heads, form: {heads}}}"
    rule = parse_rule(f"peftc: 1\nname: t\nhyper: {{r: 2, l: 2}}\ndeltas:\n  {row}\n", "t")
    with pytest.raises(PeftcError) as raised:
        rewrite(copied(mamba()), rule)
    assert not re.search("this form fits", str(raised.value))
