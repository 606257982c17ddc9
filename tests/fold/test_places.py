"""Where a merged delta lands: the right rows of a fused projection, the consumer's side, the weight itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fold.conftest import Checkpoints
from fold.support import fold, rule
from peftc.diagnostics import PeftcError
from peftc.store.model_dir import ModelDir

FUSED = {
    "gpt2": ("transformer.h.0.attn.c_attn.weight", lambda w: w.t().unflatten(0, (3, 16))),
    "bloom": ("transformer.h.0.self_attention.query_key_value.weight",
              lambda w: w.unflatten(0, (4, 3, 4)).transpose(0, 1)),
    "phi3": ("model.layers.0.self_attn.qkv_proj.weight", lambda w: torch.nn.utils.rnn.pad_sequence(w.split([16, 8, 8]))
             .transpose(0, 1)),
}  # fmt: skip
"""The fused weight of each family, and how it falls apart into q, k and v."""


@pytest.mark.parametrize("family", FUSED)
def test_lora_on_q_and_v_changes_these_rows_of_a_fused_projection_alone(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = fold("lora", checkpoint(family), tmp_path, set={"r": 3})
    name, split = FUSED[family]
    assert found.difference <= 1e-10
    assert found.changed() == {name.removeprefix("transformer.") if name not in _names(found.out) else name}
    (stored,) = found.changed()
    before, after = (split(ModelDir.open(path).read(stored)) for path in (found.base, found.out))
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[2], after[2])
    assert torch.equal(before[1], after[1])


def _names(directory: Path) -> set[str]:
    return set(ModelDir.open(directory).tensors)


IA3 = """deltas:
  keys: {at: attention, modify: [k, v], insert: sequential, compose: dh,
         form: {params: {l: {shape: [d_out], init: ones}}, expr: x * l}}
  mid: {at: ffn, modify: mid, insert: sequential, compose: dh,
        form: {params: {l: {shape: [d_out], init: ones}}, expr: x * l}}"""

CONCAT = """hyper: {r: 3}
deltas:
  one: {at: attention, modify: concat, insert: sequential, form: bottleneck, with: {f: identity}}
  two: {at: attention, modify: concat, insert: sequential, form: bottleneck, with: {f: identity},
        compose: 2 * h - dh}"""

WEIGHT = """hyper: {r: 3}
deltas:
  weight: {at: linear, modify: weight, insert: sequential, compose: h + dh, where: {role: [q, up, qkv]},
           form: {params: {A: {shape: [d_out, r], init: zeros}, B: {shape: [r, d_in], init: zeros}}, expr: A @ B}}
  norm: {at: linear, modify: weight, insert: sequential, compose: "m * dh / norm(dh)", where: {role: down},
         params: {m: {shape: [d_out, 1], init: ones}},
         form: {params: {A: {shape: [d_out, r], init: zeros}, B: {shape: [r, d_in], init: zeros}}, expr: h + A @ B}}"""

MANY = """hyper: {r: 3}
deltas:
  wide: {at: ffn, modify: out, insert: parallel, form: bottleneck, with: {f: gelu}}
  lora: {at: ffn, modify: out, insert: mid, form: low_rank}
  mid: {at: ffn, modify: mid, insert: sequential, compose: h * l + dh, form: vector,
        params: {l: {shape: [d_out], init: ones}}}
  up: {at: ffn, modify: up, insert: parallel, form: low_rank}
  weight: {at: linear, modify: weight, insert: sequential, where: {role: down},
           form: {params: {l: {shape: [d_out, 1], init: ones}}, expr: h * l}}
  seq: {at: ffn, modify: out, insert: sequential, form: bottleneck, with: {f: identity}}
  wider: {at: ffn, modify: out, insert: parallel, form: bottleneck, with: {f: gelu, r: 2}}"""


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "phi3"])
def test_scaled_keys_values_and_hidden_units_merge_from_either_side(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = fold(rule(IA3), checkpoint(family), tmp_path)
    assert found.results == {"keys": {"merged"}, "mid": {"merged"}}
    assert {d.side for d in found.decisions} == {"output", "input"}
    assert found.difference <= 1e-10


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_adapters_on_the_merged_heads_merge_into_the_projection_that_reads_them(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = fold(rule(CONCAT), checkpoint(family), tmp_path)
    assert found.results == {"one": {"merged"}, "two": {"merged"}}
    assert found.difference <= 1e-10


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_deltas_of_a_weight_are_evaluated(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = fold(rule(WEIGHT), checkpoint(family), tmp_path)
    assert found.difference <= 1e-10


def test_deltas_of_every_sort_at_one_ffn_merge_in_the_order_in_which_they_hold(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = fold(rule(MANY), checkpoint("bert"), tmp_path)
    assert found.results == {
        "wide": {"widened"}, "lora": {"merged"}, "mid": {"merged"}, "up": {"merged"}, "weight": {"merged"},
        "seq": {"merged"}, "wider": {"widened"},
    }  # fmt: skip
    assert found.difference <= 1e-10
    assert found.plain.config.intermediate_size == 24 + 3 + 2


def test_two_widenings_of_a_fused_ffn_do_not_mix_their_rows(checkpoint: Checkpoints, tmp_path: Path) -> None:
    glu = """
  {name}: {{at: ffn, modify: out, insert: parallel,
    form: {{params: {{G: {{shape: [{r}, d_in], init: zeros}}, U: {{shape: [{r}, d_in], init: zeros}},
                    D: {{shape: [d_out, {r}], init: zeros}}}},
           expr: "linear(silu(linear(x, G)) * linear(x, U), D)"}}}}"""
    up = "\n  up: {at: ffn, modify: [gate, up], insert: parallel, form: low_rank, with: {r: 2}}"
    text = "deltas:" + glu.format(name="one", r=3) + glu.format(name="two", r=2) + up
    found = fold(rule(text), checkpoint("phi3"), tmp_path)
    assert found.results == {"one": {"widened"}, "two": {"widened"}, "up": {"merged"}}
    assert found.difference <= 1e-10


def test_several_deltas_at_one_tap_merge_together(checkpoint: Checkpoints, tmp_path: Path) -> None:
    text = """hyper: {r: 3}
deltas:
  a: {at: attention, modify: q, insert: parallel, form: low_rank}
  b: {at: attention, modify: q, insert: sequential, form: bottleneck, with: {f: identity}}
  c: {at: linear, modify: bias, insert: sequential, form: vector, where: {role: q}}
  d: {at: attention, modify: q, insert: parallel, form: low_rank, compose: 3 * h - dh}"""
    found = fold(rule(text), checkpoint("bert"), tmp_path)
    assert set.union(*found.results.values()) == {"merged"}
    assert found.difference <= 1e-10


def test_a_delta_whose_parameters_are_shared_merges_at_every_site(checkpoint: Checkpoints, tmp_path: Path) -> None:
    text = """deltas:
  shared: {at: attention, modify: [k, v], insert: parallel, compose: h + 0.5 * dh,
           form: {params: {A: {shape: [2, d_in], init: zeros, share: model}, B: {shape: [d_out, 2], init: zeros}},
                  expr: "linear(linear(x, A), B)"}}"""
    found = fold(rule(text), checkpoint("bart"), tmp_path)
    assert found.difference <= 1e-10
    assert len(found.changed()) == 6
    assert sum(name.endswith(".A") for name in found.adapted.surgery.plan.parameters) == 2


BEHIND = {
    "sequential behind a kept one":
        ("sequential, form: bottleneck, with: {r: 2, f: identity}", "is in the way and stays"),
    "parallel behind a kept addition": ("mid, form: low_rank, with: {r: 2}", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_a_delta_behind_one_that_stays_merges_only_past_an_addition(
    case: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    insert, reason = BEHIND[case]
    text = f"""deltas:
  stays: {{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {{r: 3}}}}
  behind: {{at: ffn, modify: out, insert: {insert}}}"""
    with pytest.raises(PeftcError) as refused:
        fold(rule(text), checkpoint("bert"), tmp_path)
    told = [d.message for d in refused.value.diagnostics if "`behind`" in d.message.split(" stays")[0]]
    assert [reason in message for message in told] == ([True] if reason else [])


REFUSED = {
    "tied to the head": ("gpt2", "{at: embedding, modify: weight, insert: sequential, compose: dh, "
                         "form: {params: {l: {shape: [1], init: ones}}, expr: h * l}}", "lm_head, transformer.wte"),
    "tied to the embedding": ("gpt2", "{at: linear, where: {role: other}, modify: out, insert: parallel, "
                              "form: low_rank, with: {r: 2}}", "lm_head, transformer.wte"),
    "bias where there is none": ("llama", "{at: attention, modify: q, insert: sequential, "
                                 "form: {params: {b: {shape: [d_out], init: zeros}}, expr: b}}",
                                 "adds a bias, and `q_proj` has none"),
    "of no linear layer": ("bert", "{at: embedding, modify: out, insert: sequential, form: bottleneck, "
                           "with: {r: 2, f: identity}}", "neither made nor taken by a single linear layer"),
    "of another input": ("bert", "{at: attention, modify: out, insert: parallel, form: low_rank, with: {r: 2}}",
                         "its input is not that of `dense`"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_delta_that_no_weight_can_hold_is_refused_with_the_reason(
    case: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    family, delta, reason = REFUSED[case]
    with pytest.raises(PeftcError) as refused:
        fold(rule(f"deltas:\n  delta: {delta}"), checkpoint(family), tmp_path)
    assert {d.code for d in refused.value.diagnostics} == {"E037"}
    assert [d.message for d in refused.value.diagnostics if reason not in d.message] == []


def test_a_bias_tied_to_an_unread_name_merges(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = fold("bitfit", checkpoint("bert_mlm"), tmp_path)
    assert found.results == {"bias": {"merged"}}
    assert found.difference <= 1e-10


def test_trained_base_tensors_and_deltas_on_them_both_reach_the_checkpoint(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    deltas = "deltas:\n  v: {at: linear, modify: bias, insert: sequential, form: vector}"
    text = rule(deltas) + 'train: ["*.dense.bias"]\n'
    found = fold(text, checkpoint("bert"), tmp_path)
    assert found.difference <= 1e-10
