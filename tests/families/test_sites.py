"""Sites against the module tree: every attention and FFN sub-layer once, with its place, roles and dimensions."""

from __future__ import annotations

from collections.abc import Callable

from families.conftest import Subject
from families.family import HEADS, HIDDEN, LAYERS, layer_of
from peftc.ir.program import Program
from peftc.ir.sites import Site
from peftc.lang.sites import SITES

Located = Callable[[], Program]


def of_kind(program: Program, kind: str) -> list[Site]:
    return [site for site in program.sites if site.kind == kind]


def test_every_attention_sub_layer_is_one_site(subject: Subject, located: Located) -> None:
    expected = subject.family.attention_modules(subject.model)
    assert len(expected) == (3 if subject.family.seq2seq else 1) * LAYERS
    assert sorted(site.path for site in of_kind(located(), "attention")) == sorted(expected)


def test_every_ffn_sub_layer_is_one_site(subject: Subject, located: Located) -> None:
    expected = subject.family.ffn_modules(subject.model)
    assert len(expected) == (2 if subject.family.seq2seq else 1) * LAYERS
    assert sorted(site.path for site in of_kind(located(), "ffn")) == sorted(expected)


def test_every_layer_is_one_block(subject: Subject, located: Located) -> None:
    blocks = of_kind(located(), "block")
    assert len(blocks) == (2 if subject.family.seq2seq else 1) * LAYERS
    assert all(set(SITES["block"]) == set(block.taps) for block in blocks)


def test_a_site_knows_its_layer_and_stack(subject: Subject, located: Located) -> None:
    for site in [*of_kind(located(), "attention"), *of_kind(located(), "ffn"), *of_kind(located(), "block")]:
        assert (site.layer, site.stack) == (layer_of(site.path), subject.family.stack(site.path)), site.path
        assert (site.dims["layer"], site.dims["layers"]) == (site.layer, LAYERS), site.path


def test_an_attention_knows_whether_it_is_cross_or_causal(subject: Subject, located: Located) -> None:
    for site in of_kind(located(), "attention"):
        cross = subject.family.is_cross(site.path)
        assert site.variant == ("cross" if cross else "self"), site.path
        assert site.causal == (not cross and subject.family.stack(site.path) == "decoder"), site.path


def test_dimensions_are_those_of_the_config(subject: Subject, located: Located) -> None:
    family = subject.family
    for site in of_kind(located(), "attention"):
        expected = {"d_model": HIDDEN, "heads": HEADS, "kv_heads": family.kv_heads, "head_dim": family.head_dim}
        assert {name: site.dims[name] for name in expected} == expected, site.path
    for site in of_kind(located(), "ffn"):
        assert (site.dims["d_model"], site.dims["d_ff"]) == (HIDDEN, family.d_ff), site.path
        assert site.dims["gated"] == any("gate" in role for role in family.ffn_roles), site.path


def test_roles_name_the_right_linear_layer_in_every_layer(subject: Subject, located: Located) -> None:
    for site in of_kind(located(), "attention"):
        found = {role: linear.weight_name for role, linear in site.linears.items()}
        roles = subject.family.roles_of(site.path)
        assert found == {role: f"{site.path}.{module}.weight" for role, module in roles.items()}
    for site in of_kind(located(), "ffn"):
        found = {role: linear.weight_name for role, linear in site.linears.items()}
        assert found == {role: f"{site.path}.{module}.weight" for role, module in subject.family.ffn_roles.items()}


def test_every_linear_site_carries_the_role_of_its_sub_layer(subject: Subject, located: Located) -> None:
    family, program = subject.family, located()
    attentions, ffns = family.attention_modules(subject.model), family.ffn_modules(subject.model)
    expected = {f"{path}.{name}": role for path in attentions for role, name in family.roles_of(path).items()}
    expected.update({f"{path}.{name}": role for path in ffns for role, name in family.ffn_roles.items()})
    found = {site.path: site.role for site in of_kind(program, "linear") if site.role != "other"}
    assert found == expected


def test_every_tap_of_the_table_is_there(subject: Subject, located: Located) -> None:
    for kind in ("attention", "ffn"):
        for site in of_kind(located(), kind):
            assert set(site.taps) | set(site.missing) == set(SITES[kind]), site.path
            assert set(site.missing) <= {"gate"}, site.missing
