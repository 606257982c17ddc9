"""One module called several times (ALBERT's layers): its calls share a delta, which trains and folds as one.

Held to a plain ALBERT whose one weight is W + s B A.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fold.conftest import Checkpoints
from fold.support import adapt, fold, padded_inputs
from peftc.cli import app
from peftc.ir.copying import copied
from peftc.lang.loader import load_rule
from peftc.passes.fold import Fold, analyse_folds
from peftc.pipeline import rewrite
from peftc.planning.sharing import Shared, shared

LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
R, ALPHA = 2, 6.0


@pytest.mark.parametrize(
    ("rule", "values"),
    [("lora", {"r": R}), ("dora", {"r": R}), ("ln_tuning", {}), ("ia3", {})],
)
def test_deltas_of_a_module_that_is_called_twice_fold_into_its_one_weight(
    rule: str, values: dict[str, object], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = fold(rule, checkpoint("albert"), tmp_path, set=values)
    assert set.union(*found.results.values()) == {"merged"}
    assert found.difference <= 1e-10
    assert any(LAYER in name for name in found.changed())


def test_a_shared_delta_is_changed_once_and_not_once_a_call(checkpoint: Checkpoints) -> None:
    adapted = adapt("lora", checkpoint("albert"), set={"r": R})
    step = Fold()
    step.apply(adapted.program_for(padded_inputs(adapted)))
    assert len(step.decisions) == 4
    touched = [name for update in step.updates for name in update.touches]
    assert sorted(touched) == [f"{LAYER}.attention.{name}.weight" for name in ("query", "value")]


def test_a_shared_delta_gets_the_gradient_of_all_its_calls(checkpoint: Checkpoints) -> None:
    from transformers import AlbertModel

    base = checkpoint("albert")
    adapted = adapt("lora", base, set={"r": R, "alpha": ALPHA})
    plain = AlbertModel.from_pretrained(base).eval()
    names = {tap: f"{LAYER}.attention.{module}" for tap, module in (("q", "query"), ("v", "value"))}
    ours = [adapted.get_parameter(f"{LAYER}.attention.peftc.lora.{tap}.{part}") for tap in names for part in "AB"]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in ours]
    pairs = dict(zip(names.values(), zip(leaves[::2], leaves[1::2], strict=True), strict=True))
    changed = {f"{n}.weight": plain.get_parameter(f"{n}.weight") + ALPHA / R * b @ a for n, (a, b) in pairs.items()}
    theirs = torch.func.functional_call(plain, changed, kwargs=padded_inputs(plain))[0]
    mine = adapted.eval()(**padded_inputs(adapted))[0]
    assert float((mine - theirs).detach().abs().max()) <= 1e-10
    for a, b in zip(gradients(mine, ours), gradients(theirs, leaves), strict=True):
        assert float((a - b).abs().max()) <= 1e-10 and float(a.abs().max()) > 1e-6


def gradients(result: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    return torch.autograd.grad((result * weight).sum(), parameters)


def test_a_delta_at_one_of_two_calls_stays_and_says_where_the_weight_is_used(checkpoint: Checkpoints) -> None:
    adapted = adapt("lora", checkpoint("albert"), set={"r": R})
    from peftc.frontend.trace import default_inputs
    from peftc.pipeline import analyse

    skeleton = adapted.skeleton()
    program = analyse(skeleton, default_inputs(skeleton.model))
    whole = copied(program)
    plan = rewrite(whole, load_rule("lora", {"r": R}))
    assert shared(plan) == [Shared("lora", f"{LAYER}.attention", 2)]
    assert {decision.result for decision in analyse_folds(whole)} == {"merged"}
    first = next(site for site in program.sites if site.kind == "attention")
    program.sites = tuple(site for site in program.sites if site.kind != "attention" or site is first)
    plan = rewrite(program, load_rule("lora", {"r": R}))
    assert shared(plan) == []
    decisions = analyse_folds(program)
    assert {decision.result for decision in decisions} == {"kept"}
    assert all("is used in 2 places" in decision.reason for decision in decisions)


def test_the_plan_says_what_calls_share(checkpoint: Checkpoints) -> None:
    base = str(checkpoint("albert"))
    told = CliRunner().invoke(app, ["plan", "lora", base]).output.replace("\n", " ")
    note = f"note: lora has one set of parameters for the 2 calls of {LAYER}.attention"
    assert "".join(note.split()) in "".join(told.split())
    document = json.loads(CliRunner().invoke(app, ["plan", "lora", base, "--json"]).output)
    assert document["shared"] == [{"delta": "lora", "path": f"{LAYER}.attention", "calls": 2}]
    assert document["trained"] == 2 * 2 * 8 * 16  # A and B of rank 8, of q and of v, once
