"""The law of folding: whatever deltas a rule has, and whichever of them fold, the model computes the same."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fold.support import padded_inputs, rule, tiny
from peftc.fold.affine import Affine, classify
from peftc.fold.decide import Decision
from peftc.fold.linears import Reach
from peftc.fold.program_state import folded_program_state
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.program import Program
from peftc.lang.loader import parse_rule
from peftc.passes.fold import Fold
from peftc.pipeline import analyse, rewrite
from peftc.runtime.executor import Executor

FAMILIES = ("bert", "gpt2", "phi3")

PLACES = (
    ("attention", "q", "parallel"), ("attention", "v", "parallel"), ("attention", "k", "sequential"),
    ("attention", "concat", "sequential"), ("attention", "out", "sequential"), ("attention", "out", "concat"),
    ("ffn", "up", "parallel"), ("ffn", "up", "sequential"), ("ffn", "mid", "sequential"), ("ffn", "out", "mid"),
    ("ffn", "out", "sequential"), ("ffn", "out", "parallel"), ("linear", "out", "parallel"),
    ("linear", "out", "sequential"),
)  # fmt: skip

PARAMS = """A: {shape: [RANK, d_in], init: zeros}, B: {shape: [d_out, RANK], init: zeros},
                   c: {shape: [RANK], init: zeros, if: INNER}, e: {shape: [d_out], init: zeros, if: BIASED},
                   m: {shape: [1, 1, d_out], init: ones}"""

LOWER = ("linear(x, A, c)", "x @ A.T", "einsum('bsd,rd->bsr', x, A)", "(linear(x, A) - mean(x))[:, :, 0:RANK]",
         "gelu(linear(x, A))", "relu(x @ A.T)")  # fmt: skip

COMPOSE = ("h + dh", "h + SCALE * dh", "2 * h - dh", "h * m + dh", "(h - dh) / 3", "m * (h + dh)", "h * 1 + dh")

delta = st.fixed_dictionaries({
    "place": st.sampled_from(PLACES), "rank": st.integers(1, 4), "biased": st.booleans(),
    "lower": st.sampled_from(LOWER), "scale": st.sampled_from(["0.5", "-3.0", "1.0"]),
    "compose": st.sampled_from(COMPOSE),
})  # fmt: skip


def text_of(deltas: list[dict[str, Any]]) -> str:
    rows = []
    for index, given_ in enumerate(deltas):
        at, modify, insert = given_["place"]
        where = ", where: {role: [q, v, qkv, o, up, down]}" if at == "linear" else ""
        row = f"""  d{index}: {{at: {at}, modify: {modify}, insert: {insert}{where}, compose: "{given_["compose"]}",
       params: {{}}, form: {{params: {{{PARAMS}}}, expr: "linear({given_["lower"]}, B, e) + 0 * m"}}}}"""
        inner = given_["biased"] and "c)" in given_["lower"]
        words = {"INNER": inner, "RANK": given_["rank"], "BIASED": given_["biased"], "SCALE": given_["scale"]}
        for word, value in words.items():
            row = row.replace(word, str(value).lower())
        rows.append(row)
    return rule("deltas:\n" + "\n".join(rows))


@functools.cache
def model_of(family: str) -> Any:
    return tiny(family)


@settings(
    max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(family=st.sampled_from(FAMILIES), deltas=st.lists(delta, min_size=1, max_size=3))
def test_folding_what_folds_changes_no_output(family: str, deltas: list[dict[str, Any]]) -> None:
    model = model_of(family)
    skeleton = build_skeleton(type(model), model.config, torch.float64)
    program = analyse(skeleton, default_inputs(skeleton.model))
    plan = rewrite(program, parse_rule(text_of(deltas), "law.yaml"))
    state = {**skeleton.buffers, **model.state_dict(keep_vars=False)}
    generator = torch.Generator().manual_seed(4)
    for name, parameter in plan.parameters.items():
        state[name] = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = run(program, state, model)
    step = Fold()
    step.apply(program)
    for decision in step.decisions:
        check_reasons(program, decision)
    folded = folded_program_state(state.__getitem__, program, step)
    after = run(program, {**state, **folded}, model)
    largest = max(float(value.abs().max()) for value in before)
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) <= 1e-10 * max(1.0, largest)
    assert not [name for name in program.delta_parameters if name.split(".peftc.")[1].split(".")[0] in gone(step)]


def gone(step: Fold) -> set[str]:
    """Deltas that folded at every site."""
    staying = {d.insertion.delta for d in step.decisions if not d.folds}
    return {d.insertion.delta for d in step.decisions} - staying


def check_reasons(program: Program, decision: Decision) -> None:
    """A delta stays with a reason; one that is not affine is never merged."""
    reach, insertion = Reach(program), decision.insertion
    kind = classify(insertion.nodes, reach.streams(insertion), reach.parameters)[insertion.after]
    assert decision.folds or decision.reason
    assert decision.result != "merged" or isinstance(kind, Affine)


def run(program: Program, state: dict[str, torch.Tensor], model: Any) -> list[torch.Tensor]:
    inputs = padded_inputs(model)
    with torch.no_grad():
        found = Executor(program, training=False, device=torch.device("cpu")).flat(state, inputs)
    return [value[inputs["attention_mask"].bool()] if value.dim() == 3 else value for value in found]
