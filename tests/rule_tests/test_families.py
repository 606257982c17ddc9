"""The built-in families: what transformers computes with the same weights, and copies of one trace that stay apart."""

from __future__ import annotations

import pytest
import torch

from peftc.checking.families import FAMILIES, ROLES, traced
from peftc.checking.rule_test_states import distance
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.lang.loader import load_rule
from peftc.pipeline import analyse, rewrite
from peftc.runtime.init import initialize

SEQ2SEQ = ("t5", "bart")


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_family_computes_what_transformers_computes(name: str) -> None:
    subject = traced(name)
    cls, config = type(subject.skeleton.model), subject.skeleton.config
    torch.set_default_dtype(torch.float64)  # Gemma's scale of the embeddings is rounded as it is made
    try:
        model = cls(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # its grouped products know no float64
    model.load_state_dict({key: subject.state[key] for key in model.state_dict()})
    extra = {"use_cache": False} if hasattr(config, "use_cache") else {}
    for inputs, ours in zip(subject.batches, subject.outputs, strict=True):
        with torch.no_grad():
            answers = [value for value in model(**inputs, **extra).to_tuple() if isinstance(value, torch.Tensor)]
        mask = inputs.get("attention_mask")
        for theirs, own in zip(answers, ours, strict=True):
            real = theirs[mask.bool()] if mask is not None and theirs.shape[:2] == mask.shape else theirs
            assert float((own - real).abs().max()) <= 1e-10
            assert float(own.std()) > 0.05  # something is computed


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_two_layers_of_the_same_sizes(name: str) -> None:
    sites = traced(name).located.sites
    attentions = [site for site in sites if site.kind == "attention"]
    ffns = [site for site in sites if site.kind == "ffn"]
    assert (len(attentions), len(ffns)) == ((6, 4) if name in SEQ2SEQ else (2, 2))
    assert {(site.dims["d_model"], site.dims["heads"], site.dims["head_dim"]) for site in attentions} == {(32, 4, 8)}
    assert {site.dims["d_ff"] for site in ffns} == {64}


def test_roles_name_families() -> None:
    assert {role: traced(role).family for role in ROLES} == {role: FAMILIES[name] for role, name in ROLES.items()}


def test_copy_of_a_program_computes_what_a_trace_of_its_own_does_and_leaves_the_original_alone() -> None:
    subject, rule = traced("bart"), load_rule("mam", {"l": 3, "r": 4})
    before = [node.format_node() for node in subject.located.graph.nodes]
    skeleton = build_skeleton(type(subject.skeleton.model), subject.skeleton.config, torch.float64)
    traced_anew = analyse(skeleton, default_inputs(skeleton.model))
    outputs = []
    for program in (subject.program(), subject.program(), traced_anew):
        plan = rewrite(program, rule)
        deltas = {key: initialize(parameter, 5) for key, parameter in plan.parameters.items()}
        outputs.append(subject.run(program, {**subject.state, **deltas}))
    assert distance(outputs[0], outputs[1]) == distance(outputs[0], outputs[2]) == 0.0
    assert distance(outputs[0], subject.outputs) > 1e-3
    assert [node.format_node() for node in subject.located.graph.nodes] == before
    assert not subject.located.ledger
    assert not subject.located.delta_parameters
