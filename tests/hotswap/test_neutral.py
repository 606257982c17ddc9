"""Which deltas can be inputs with a neutral default: read off the graph, by no method's name."""

from __future__ import annotations

import pytest

from peftc.checking.families import traced
from peftc.diagnostics import PeftcError
from peftc.hotswap.joint import Group, Joint, joint_program
from peftc.hotswap.structure import structure_of
from peftc.lang.loader import load_rule

NONE: frozenset[str] = frozenset()


def joint(*rules: tuple[str, dict[str, object]]) -> Joint:
    program = traced("encoder").program()
    loaded = [load_rule(name, sets) for name, sets in rules]
    groups = [Group(rule.name, structure_of(rule, program, NONE), (rule.name,)) for rule in loaded]
    return joint_program(program, groups, (), NONE)


def signature(name: str, **sets: object) -> object:
    return structure_of(load_rule(name, sets), traced("encoder").program(), NONE).signature


def test_rank_width_and_length_are_open_and_what_is_of_the_model_is_not() -> None:
    inputs = joint(("mam", {"r": 4, "l": 3}), ("lora", {"r": 1})).inputs
    shapes = {name.partition(".layer.0.")[2]: spec.default_shape for name, spec in inputs.items()}
    assert shapes["attention.lora.lora.q.A"] == (0, 32) and shapes["attention.lora.lora.q.B"] == (32, 0)
    assert shapes["attention.mam.prefix.P_k"] == (0, 4, 8)
    assert shapes["mam.adapter.W_down"] == (0, 32) and shapes["mam.adapter.b_up"] == (32,)


@pytest.mark.slow
def test_structures_are_the_same_whatever_rank_and_scale_and_rule_but_not_activation_or_bias() -> None:
    lora = signature("lora", r=4)
    assert lora == signature("lora", r=1, alpha=3.0) == signature("rslora", r=7)
    assert signature("houlsby", r=4) != signature("houlsby", r=4, f="gelu")
    assert signature("houlsby", r=4) == signature("houlsby", r=6)


def test_a_factor_has_ones_and_a_moved_bias_zeros_by_default() -> None:
    inputs = joint(("ia3", {})).inputs
    assert {spec.neutral for spec in inputs.values()} == {1.0}
    assert not any(isinstance(size, str) for spec in inputs.values() for size in spec.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "sets"),
    [("bitfit", {}), ("loha", {"r": 2}), ("unipelt", {"r": 4, "r_lora": 2, "l": 3}), ("prefix_gated", {"l": 3}),
     ("vera", {"r": 4}), ("adalora", {"r": 4})],
)  # fmt: skip
def test_methods_without_a_word_of_them_in_the_proof_are_proved(rule: str, sets: dict[str, object]) -> None:
    assert joint((rule, sets)).inputs


@pytest.mark.parametrize(("rule", "sets"), [("dora", {"r": 2}), ("hra", {"r": 2})])
def test_a_weight_taken_apart_and_put_together_again_is_refused(rule: str, sets: dict[str, object]) -> None:
    with pytest.raises(PeftcError, match=rf"E090.*{rule} cannot be an optional input"):
        joint((rule, sets))
