"""A parallel bottleneck with the FFN's own activation becomes more hidden units of a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fold.conftest import Checkpoints
from fold.support import fold, merge, rule
from peftc.diagnostics import PeftcError

GATED = rule("""hyper: {r: 3}
deltas:
  glu:
    at: ffn
    modify: out
    insert: parallel
    compose: h + 2.0 * dh
    form:
      params:
        G: {shape: [r, d_in], init: kaiming_uniform}
        U: {shape: [r, d_in], init: kaiming_uniform}
        D: {shape: [d_out, r], init: zeros}
      expr: linear(linear(x, U) * silu(linear(x, G)), D)""")

SPELLED = rule("""hyper: {r: 3}
deltas:
  spelled:
    at: ffn
    modify: out
    insert: parallel
    form:
      params: {A: {shape: [r, d_in], init: kaiming_uniform}, B: {shape: [d_out, r], init: zeros}}
      let: {z: "linear(x, A)", f: "0.5 * z * (1 + tanh(0.7978845608028654 * (z + 0.044715 * z ** 3)))"}
      expr: linear(f, B)""")

OWN: dict[str, tuple[str, str, dict[str, Any], dict[str, int]]] = {
    "bert": ("bert", "scaled_pa", {"f": "gelu"}, {"intermediate_size": 27}),
    "bart": ("bart", "pa_ffn", {"f": "gelu"}, {"encoder_ffn_dim": 27, "decoder_ffn_dim": 23}),
    "gpt2": ("gpt2", "scaled_pa", {"f": "gelu_tanh"}, {"n_inner": 67}),
    "gpt2 spelled": ("gpt2", SPELLED, {}, {"n_inner": 67}),
    "opt": ("opt", "scaled_pa_learned", {"f": "relu"}, {"ffn_dim": 27}),
    "t5": ("t5", "pa_ffn", {"f": "relu", "bias": False}, {"d_ff": 27}),
    "distilbert": ("distilbert", "pa_ffn", {"f": "gelu"}, {"hidden_dim": 27}),
    "llama": ("llama", GATED, {}, {"intermediate_size": 27}),
    "phi3": ("phi3", GATED, {}, {"intermediate_size": 27}),
}


@pytest.mark.parametrize("case", OWN)
def test_a_widened_checkpoint_loads_in_plain_transformers_with_equal_outputs(
    case: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    family, source, hypers, sizes = OWN[case]
    options = {} if "\n" in source else {"set": {"r": 3, **hypers}}
    found = fold(source, checkpoint(family), tmp_path, **options)
    assert set.union(*found.results.values()) == {"widened"}
    assert found.difference <= 1e-10
    assert {name: getattr(found.plain.config, name) for name in sizes} == sizes


def test_the_ffn_half_of_mam_merges_by_command_with_its_own_activation(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = merge("scaled_pa", checkpoint("bert"), tmp_path, set={"r": 3, "f": "gelu"})
    assert found.results == {"adapter": {"widened"}}
    assert found.difference <= 1e-10
    assert all(c["absolute"] <= 1e-10 for c in found.certificate["comparisons"])


SOME = """hyper: {{r: 3}}
deltas:
  one: {{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {{r: 2, f: {f}}}, where: {{layers: [0]}}}}
  two: {{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {{r: 5, f: {f}}}, where: {{layers: [1]}}}}
  all: {{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {{f: {f}}}, where: {{layers: {all}}}}}"""


def test_layers_without_a_delta_or_with_a_smaller_one_are_padded(checkpoint: Checkpoints, tmp_path: Path) -> None:
    one = "{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {r: 3, f: gelu}, where: {layers: [1]}}"
    only = fold(rule(f"deltas:\n  one: {one}"), checkpoint("bert"), tmp_path / "only")
    assert only.difference <= 1e-10
    up = only.plain.encoder.layer[0].intermediate.dense
    assert up.weight.shape == (27, 16) and not up.weight[24:].any() and not up.bias[24:].any()
    both = fold(rule(SOME.format(f="gelu", all="[0, 1]")), checkpoint("bert"), tmp_path / "both")
    assert both.difference <= 1e-10
    assert both.plain.config.intermediate_size == 24 + 5 + 3
    assert not both.plain.encoder.layer[0].intermediate.dense.weight[24 + 2 + 3 :].any()


def test_a_fused_gate_and_up_is_padded_in_both_halves(checkpoint: Checkpoints, tmp_path: Path) -> None:
    twice = GATED + GATED[GATED.index("  glu:") :].replace("glu", "more").replace("2.0", "0.5")
    first = twice.replace("    insert: parallel\n    compose: h + 2.0", "    where: {layers: [0]}\n"
                          "    insert: parallel\n    compose: h + 2.0")  # fmt: skip
    found = fold(first, checkpoint("phi3_deep"), tmp_path)
    assert found.difference <= 1e-10
    assert found.plain.config.intermediate_size == 24 + 3 + 3


KEPT = {
    "a relu adapter on a gelu FFN": ("bert", {"f": "relu"}, "`relu` is not affine.*activation is not the FFN's own"),
    "a tanh gelu on an exact one": ("bert", {"f": "gelu_tanh"}, "differ by up to .*e-04"),
    "a bias beside an FFN that has none": ("t5", {"f": "relu"}, "it has a bias, and .* has none"),
    "an ungated delta beside a gated FFN": ("llama", {"f": "silu", "bias": False}, "the FFN is gated and the delta is"),
    "an FFN whose weights are used twice": ("albert", {"f": "gelu_tanh"}, "is used in 2 places"),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_delta_that_cannot_be_widened_is_kept_with_its_reason(
    case: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    family, hypers, reason = KEPT[case]
    with pytest.raises(PeftcError, match=reason) as refused:
        fold("pa_ffn", checkpoint(family), tmp_path, set={"r": 3, **hypers})
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "E037"
    assert "delta `adapter`" in diagnostic.message and "(node " in diagnostic.message


def test_a_refused_merge_writes_nothing(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(PeftcError) as refused:
        merge("pa_pa", checkpoint("bert"), tmp_path, set={"r_attn": 2, "r_ffn": 3})
    assert [d.code for d in refused.value.diagnostics] == ["E037", "E037"]
    assert [name for d in refused.value.diagnostics for name in ("`attn`", "`ffn`") if name in d.message] == [
        "`attn`", "`ffn`",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]
