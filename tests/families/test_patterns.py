"""The library's patterns find what the finders of `peftc.locate` find, on every family."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from families.conftest import Subject
from peftc.ir.program import Program
from peftc.ir.sites import Site
from peftc.lang.library import load_pattern
from peftc.patterns.graph import plain_value
from peftc.patterns.sites import find

Located = Callable[[], Program]
FFNS = ("plain_ffn", "gated_ffn", "fused_gated_ffn")
SPELLED_OUT = ("bloom",)
"""Families whose attention is no single op."""
FUSED = ("gpt2", "phi3")
"""Families whose q, k and v are one projection."""


def sites_of(program: Program, name: str) -> list[Site]:
    pattern = load_pattern(name)
    assert pattern is not None
    return find(program, [pattern]).sites


def value(site: Site, tap: str) -> fx.Node | None:
    return plain_value(site.taps[tap].node) if tap in site.taps else None


def place(site: Site, taps: tuple[str, ...]) -> tuple[object, ...]:
    dims = tuple(site.dims.get(name) for name in ("d_model", "d_ff"))
    return site.path, site.layer, site.stack, dims, *(value(site, tap) for tap in taps)


def test_three_patterns_find_every_ffn_with_the_same_taps(subject: Subject, located: Located) -> None:
    taps = ("x", "gate", "up", "mid", "out", "residual")
    expected = [place(site, taps) for site in located().sites if site.kind == "ffn"]
    found = {name: sites_of(located(), name) for name in FFNS}
    assert [name for name in FFNS if found[name]] == [
        "fused_gated_ffn" if "gate_up" in subject.family.ffn_roles
        else "gated_ffn" if "gate" in subject.family.ffn_roles
        else "plain_ffn"
    ]  # fmt: skip
    assert [place(site, taps) for sites in found.values() for site in sites] == expected
    weights = [{linear.weight_name for linear in site.linears.values()} for sites in found.values() for site in sites]
    assert weights == [
        {linear.weight_name for linear in site.linears.values()} for site in located().sites if site.kind == "ffn"
    ]


def test_a_pattern_finds_every_attention_with_a_projection_each(subject: Subject, located: Located) -> None:
    if subject.family.name in (*SPELLED_OUT, *FUSED):
        assert sites_of(located(), "sdpa_attention") == []
        return
    taps = ("x", "ctx", "out")
    expected = [site for site in located().sites if site.kind == "attention"]
    found = sites_of(located(), "sdpa_attention")
    assert [(s.path, s.layer, s.stack, *(value(s, tap) for tap in taps)) for s in found] == [
        (s.path, s.layer, s.stack, *(value(s, tap) for tap in taps)) for s in expected
    ]
    names = [{role: linear.weight_name for role, linear in site.linears.items()} for site in expected]
    assert [tuple(site.linears[role].weight_name for role in ("q", "k", "v", "out")) for site in found] == [
        tuple(roles[role] for role in "qkvo") for roles in names
    ]


def test_a_pattern_finds_every_root_mean_square_norm(subject: Subject, located: Located) -> None:
    norms = [site for site in located().sites if site.kind == "norm" and "bias" not in site.taps]
    found = sites_of(located(), "rms_norm")
    assert [(s.path, value(s, "out"), value(s, "weight")) for s in found] == [
        (s.path, value(s, "out"), value(s, "weight")) for s in norms
    ]


def test_a_pattern_finds_the_head_that_is_tied_to_the_embeddings(subject: Subject, located: Located) -> None:
    tied = getattr(subject.model.config, "tie_word_embeddings", False) and hasattr(subject.model, "lm_head")
    found = [(site.path, site.stack, site.layer) for site in sites_of(located(), "tied_head")]
    assert found == ([("lm_head", "decoder", -1)] if tied else [])
