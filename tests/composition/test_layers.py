"""Hyperparameters with values of single layers: held to HF peft's rank patterns, and to rows of single layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import peftc
from composition.conftest import Planner, logits, rendered, scramble
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.lang.layers import layer_set, selector, shown_layers
from peftc.lang.loader import load_rule, parse_rule

Directory = Callable[[str], Path]
EXACT = 1e-12

LORA = """\
peftc: 1
name: mine
extends: lora
hyper:
  r: {layers: {0: 3, "last 2": 5, 3: 7}}
  alpha: 4.0
"""
FFN = "deltas: {a: {at: ffn, modify: out, form: bottleneck}}\n"
RANKS = {0: 3, 1: 2, 2: 5, 3: 7}


def rule_of(text: str, **sets: object) -> Any:
    return parse_rule(text, "mine.yaml", sets)


def layer_of(name: str) -> int:
    found = re.search(r"layers?\.(\d+)\.", name)
    assert found, name
    return int(found[1])


@pytest.mark.parametrize(
    ("text", "count", "layers"),
    [
        ("0", 4, {0}), ("-1", 4, {3}), ("-4", 4, {0}), ("1-2", 4, {1, 2}), ("first 2", 4, {0, 1}),
        ("last 9", 4, {0, 1, 2, 3}), (" 1 - 2 ", 4, {1, 2}), ("2-2", 4, {2}),
    ],
)  # fmt: skip
def test_selector_names_these_layers(text: str, count: int, layers: set[int]) -> None:
    assert layer_set(selector(text), count) == layers


@pytest.mark.parametrize("text", ["", "first", "first 0", "3-1", "1.0", "all", "-1-2", "first -1", "1234567", "٣"])
def test_what_names_no_layer_is_no_selector(text: str) -> None:
    assert selector(text) is None


def test_layers_are_shown_as_runs() -> None:
    assert shown_layers({0, 1, 2, 5, 7, 8}) == "layers 0-2, 5, 7-8"
    assert shown_layers({3}) == "layer 3"


def test_ranks_by_layer_are_those_of_peft_in_outputs_and_gradients(directory: Directory) -> None:
    ours = scramble(peftc.apply(rule_of(LORA, r=2), directory("llama")))
    base = transformers.LlamaForCausalLM.from_pretrained(directory("llama"), dtype=torch.float64)
    pattern = {rf"layers\.{layer}\..*": rank for layer, rank in RANKS.items() if layer != 1}
    config = peft.LoraConfig(r=2, lora_alpha=4, rank_pattern=pattern, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(base, config).double().eval()
    pairs: list[tuple[str, torch.nn.Parameter]] = []
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            layer, tap, which = layer_of(name), name.split("_proj")[0][-1], "A" if "lora_A" in name else "B"
            pairs.append((f"model.layers.{layer}.self_attn.peftc.lora.{tap}.{which}", parameter))
    assert {name for name, _ in pairs} == set(ours.surgery.plan.parameters)
    with torch.no_grad():
        for name, parameter in pairs:
            parameter.copy_(ours.get_parameter(name))
            assert RANKS[layer_of(name)] in parameter.shape
    one, other = logits(ours), logits(theirs)
    assert (one - other).abs().max() < EXACT
    weight = torch.linspace(-1, 1, one.numel(), dtype=one.dtype).reshape(one.shape)
    mine = torch.autograd.grad((one * weight).sum(), [ours.get_parameter(name) for name, _ in pairs])
    for gradient, expected in zip(
        mine, torch.autograd.grad((other * weight).sum(), [p for _, p in pairs]), strict=True
    ):
        assert (gradient - expected).abs().max() < 1e-10


def test_set_replaces_the_default_alone() -> None:
    rule = rule_of(LORA, r=2)
    assert [rule.hyper["r"].at(layer, 4) for layer in range(4)] == [3, 2, 5, 7]
    assert rule.hyper["r"].at(-1, 4) == 2
    again = parse_rule(rule.text, "again.yaml")
    assert [again.hyper["r"].at(layer, 4) for layer in range(4)] == [3, 2, 5, 7]
    plain = f"peftc: 1\nname: p\nhyper:\n  r: {{default: 8, layers: {{0: 3}}}} # kept\n{FFN}"
    assert rule_of(plain, r=4).text == plain.replace("default: 8", "default: 4")


EVERYWHERE = """\
peftc: 1
name: t
hyper:
  r: {default: 2, layers: {1: 4, 3: 6}}
  s: {default: 1.0, layers: {3: 0.5}}
  f: {default: relu, layers: {1: gelu}}
deltas:
  a:
    at: ffn
    modify: out
    where: {if: r > 2}
    form: bottleneck
    with: {bias: r > 4, r: 2 * r}
    params: {g: {shape: [r // 2], init: constant(s), if: s < 1}}
    compose: h + s * dh + g[0] * h if s < 1 else h + s * dh
"""


def test_value_of_the_layer_is_seen_by_every_expression(plan: Planner) -> None:
    edits = {edit.site.layer: edit for edit in plan(rule_of(EVERYWHERE), "bert").edits}
    seen = {layer: [edit.statics[name] for name in "rsf"] for layer, edit in edits.items()}
    assert seen == {1: [8, 1.0, "gelu"], 3: [12, 0.5, "relu"]}
    shapes = {
        layer: {name: p.shape for name, p in edit.parameters.items() if p is not None} for layer, edit in edits.items()
    }
    assert shapes[1] == {"W_down": (8, 32), "W_up": (32, 8)}
    assert shapes[3] == {"W_down": (12, 32), "b_down": (12,), "W_up": (32, 12), "b_up": (32,), "g": (6,)}


def test_compose_and_op_of_the_layer_are_computed(directory: Directory) -> None:
    """Layer 1 adds a gelu bottleneck, layer 3 half a relu one and g[0] h; by hooks on the base model's modules."""
    ours = scramble(peftc.apply(rule_of(EVERYWHERE), directory("bert")))
    base = transformers.BertForSequenceClassification.from_pretrained(directory("bert")).eval()

    def hook(layer: int) -> Any:
        p = {n.rpartition(".")[2]: v for n, v in ours.named_parameters() if f"layer.{layer}." in n and ".peftc." in n}
        activation = torch.nn.functional.gelu if layer == 1 else torch.relu

        def change(module: Any, arguments: Any, h: torch.Tensor) -> torch.Tensor:
            x = inner[layer]
            dh = activation(x @ p["W_down"].T + p.get("b_down", 0)) @ p["W_up"].T + p.get("b_up", 0)
            return h + dh if layer == 1 else h + 0.5 * dh + p["g"][0] * h

        return change

    inner: dict[int, torch.Tensor] = {}
    for layer in (1, 3):
        block = base.bert.encoder.layer[layer]
        block.intermediate.register_forward_pre_hook(lambda module, given, layer=layer: inner.update({layer: given[0]}))
        block.output.dense.register_forward_hook(hook(layer))
    assert (logits(ours) - logits(base)).abs().max() < EXACT


def test_one_row_with_layers_is_rows_of_single_layers(directory: Directory) -> None:
    head = "peftc: 1\nname: t\nhyper: {r: 2}\ndeltas:\n"
    row = "at: ffn, modify: out, form: bottleneck, compose: h + r * dh"
    rows = f"  a: {{{row}, where: {{layers: [0, 3]}}}}\n  b: {{{row}, where: {{layers: [1, 2]}}, with: {{r: 5}}}}\n"
    apart = scramble(peftc.apply(rule_of(head + rows), directory("bert")))
    whole = head.replace("{r: 2}", "{r: {default: 2, layers: {1-2: 5}}}") + f"  a: {{{row}}}\n"
    together = peftc.apply(rule_of(whole), directory("bert"))
    assert {p.shape for p in together.surgery.plan.parameters.values()} == {
        p.shape for p in apart.surgery.plan.parameters.values()
    }
    with torch.no_grad():
        for name, parameter in together.named_parameters():
            if ".peftc." in name:
                source = name if layer_of(name) in (0, 3) else name.replace(".peftc.a.", ".peftc.b.")
                parameter.copy_(apart.get_parameter(source))
    assert (logits(together) - logits(apart)).abs().max() < EXACT


def test_layers_are_counted_within_each_stack(plan: Planner) -> None:
    text = f"peftc: 1\nname: t\nhyper: {{r: {{default: 1, layers: {{-1: 2}}}}}}\n{FFN}"
    ranks = [(e.site.stack, e.site.layer, e.statics["r"]) for e in plan(rule_of(text), "bart").edits]
    assert ranks == [("encoder", 0, 1), ("encoder", 1, 2), ("decoder", 0, 1), ("decoder", 1, 1), ("decoder", 2, 2)]


def test_site_outside_of_layers_has_the_default(plan: Planner) -> None:
    text = "peftc: 1\nname: t\nhyper: {r: {default: 1, layers: {-1: 2, first 9: 3}}}\n"
    text += "deltas: {a: {at: linear, modify: out, form: low_rank, where: {path: lm_head}}}\n"
    assert [e.statics["r"] for e in plan(rule_of(text), "llama").edits] == [1]


SHARED = """\
peftc: 1
name: t
hyper: {r: {default: 2, layers: {1: 4}}}
deltas:
  a:
    at: ffn
    modify: out
    form: linear(linear(x, A), B)
    params:
      A: {shape: [r, d_in], init: kaiming_uniform, share: SHARE}
      B: {shape: [d_out, r], init: zeros}
"""


def test_tensor_that_layers_share_must_have_one_size(plan: Planner) -> None:
    for share in ("stack", "model", "kind"):
        with pytest.raises(PeftcError) as raised:
            plan(rule_of(SHARED.replace("SHARE", share)), "bert")
        (diagnostic,) = raised.value.diagnostics
        assert diagnostic.code == "E053"
        assert f"one tensor for each {share}, but is [2, 32]" in diagnostic.message
        assert diagnostic.span is not None and diagnostic.span.line == 10
    assert len(plan(rule_of(SHARED.replace("SHARE", "layer")), "bert").parameters) == 8


def test_shared_tensor_must_start_alike(plan: Planner) -> None:
    row = "{at: ffn, modify: out, form: g * x, insert: sequential, params: {g: {shape: [d_out], init: constant(s), "
    text = (
        f"peftc: 1\nname: t\nhyper: {{s: {{default: 2.0, layers: {{1: 4}}}}}}\ndeltas: {{a: {row}share: model}}}}}}}}\n"
    )
    with pytest.raises(PeftcError, match="but starts as"):
        plan(rule_of(text), "bert")


def test_value_for_a_layer_that_no_stack_has_is_told(plan: Planner) -> None:
    text = LORA.replace("0: 3", "4: 3").replace("3: 7", "-5: 7")
    with pytest.raises(PeftcError) as raised:
        plan(rule_of(text), "llama")
    assert [(d.code, d.span.col if d.span else 0) for d in raised.value.diagnostics] == [("E053", 19), ("E053", 39)]
    assert raised.value.diagnostics[0].help == "the decoder has layers 0 to 3"


def test_plan_tells_the_value_of_each_layer(directory: Directory, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(LORA, encoding="utf-8")
    report = driver.plan(file, directory("llama"), {"r": 2})
    assert report.to_json()["per_layer"] == {"r": {"decoder": {0: 3, 1: 2, 2: 5, 3: 7}}}
    assert "r = 3 in layer 0, 2 in layer 1, 5 in layer 2, 7 in layer 3" in rendered(report)


@pytest.mark.parametrize("rule", [pytest.param("lora", marks=pytest.mark.slow), "pa_ffn"])
def test_deltas_of_differing_sizes_are_saved_loaded_and_merged(rule: str, directory: Directory, tmp_path: Path) -> None:
    text = f'peftc: 1\nname: t\nextends: {rule}\nhyper: {{r: {{default: 2, layers: {{0: 3, "last 1": 5}}}}'
    text += ", f: gelu, bias: false}\n" if rule == "pa_ffn" else "}\n"
    model = scramble(peftc.apply(rule_of(text), directory("bert")))
    model.save_pretrained(tmp_path / "deltas")
    assert "extends" not in (tmp_path / "deltas" / "rule.yaml").read_text(encoding="utf-8")
    loaded = peftc.load(tmp_path / "deltas")
    assert torch.equal(logits(loaded), logits(model))
    driver.merge(tmp_path / "deltas", tmp_path / "merged", export={"hf"})
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(plain) - logits(model)).abs().max() < 1e-9


def test_library_rules_take_values_by_layer_where_nothing_is_shared(plan: Planner) -> None:
    for name in ("houlsby", "dora", "loha"):
        assert "r" in load_rule(name).hyper
        text = f"peftc: 1\nextends: {name}\nhyper: {{r: {{default: 2, layers: {{first 1: 4}}}}}}\n"
        edits = plan(rule_of(text), "bert").edits
        assert {e.statics["r"] for e in edits if e.site.layer == 0} == {4}
        assert {e.statics["r"] for e in edits if e.site.layer > 0} == {2}
