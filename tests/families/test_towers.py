"""Models of several towers: each counts its layers from 0, is a stack by its own attention, and is read by itself."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import transformers

from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.lang.loader import parse_rule
from peftc.lang.rule import Rule
from peftc.pipeline import analyse, rewrite

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "vocab_size": 50, "eos_token_id": 49, "projection_size": 16}
IMAGE: dict[str, Any] = {**SIZES, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
STACK = {"CLIP": "decoder", "Siglip": "encoder"}
"""Of the text tower: CLIP's is causal, SigLIP's is not."""


@lru_cache
def _traced(name: str) -> Program:
    config: Any = getattr(transformers, name + "Config")(text_config=dict(TEXT), vision_config=dict(IMAGE))
    skeleton = build_skeleton(getattr(transformers, name + "Model"), config)
    return analyse(skeleton, default_inputs(skeleton.model))


def _rule(row: str) -> Rule:
    return parse_rule("peftc: 1\nname: a\ndeltas:\n  d: {" + row + "}\n", "rule.yaml")


@pytest.mark.parametrize("name", STACK)
def test_each_tower_counts_its_own_layers(name: str) -> None:
    sites = [site for site in _traced(name).sites if site.kind in ("ffn", "block") and site.layer >= 0]
    found = {(site.path.split(".")[0], site.stack, site.layer, site.dims["layers"]) for site in sites}
    text = {("text_model", STACK[name], layer, 2) for layer in range(2)}
    assert found == text | {("vision_model", "encoder", layer, 3) for layer in range(3)}


def test_the_language_tower_is_named_by_its_stack_and_the_last_layers_are_those_of_each_tower() -> None:
    row = "at: ffn, modify: out, insert: parallel, form: low_rank, with: {r: 2}, where: {%s}"
    program = _traced("CLIP")
    language = rewrite(copied(program), _rule(row % "stack: decoder"))
    assert [edit.site.path.split(".")[0] for edit in language.edits] == ["text_model"] * 2
    last = rewrite(copied(program), _rule(row % "layers: [-1]"))
    assert {edit.site.block.split(".layers.")[1] for edit in last.edits} == {"1", "2"} and len(last.edits) == 2


def test_the_layer_before_is_one_of_the_same_tower() -> None:
    row = "at: block, modify: out, from: 'block[layer - 1].out', form: low_rank, with: {r: 2}, where: {if: layer > 0}"
    plan = rewrite(copied(_traced("Siglip")), _rule(row))
    read = {edit.site.path: edit.sources["x"].site.path for edit in plan.edits}
    assert len(read) == 3 and all(path.split(".")[0] == other.split(".")[0] for path, other in read.items()), read
