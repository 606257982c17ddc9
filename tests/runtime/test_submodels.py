"""The models inside an adapted model, called by themselves, run with their deltas: some trainers call the backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from peftc.diagnostics import PeftcError
from peftc.lang.loader import parse_rule
from peftc.runtime.submodels import Place, refuse_other
from runtime.tiny import batch, moved

Load = Callable[..., Any]
MAM = {"l": 3, "r": 4}

HEAD_TOO = """\
peftc: 1
name: head-too
hyper: {r: 2}
deltas:
  body: {at: ffn, modify: out, insert: parallel, form: low_rank, compose: h + dh}
  head: {at: linear, where: {path: lm_head}, modify: out, insert: parallel, form: low_rank, compose: h + dh}
  shared: {at: linear, where: {role: q}, modify: out, form: g, compose: h * dh, params: {
    g: {shape: [d_out], init: ones, share: model}}}
"""


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (value * torch.linspace(0, 1, value.numel(), dtype=value.dtype).view(value.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_backbone_and_head_called_apart_are_the_whole_model(model_dir: Load, name: str) -> None:
    """The reference is the whole model's own hidden state, which the base documents as the backbone's result."""
    model = moved(peftc.apply("mam", model_dir(name), set=MAM, dtype=torch.float64))
    whole = model(**batch())
    wanted = gradients(model, whole.logits)
    apart = model.base_model(**batch())
    assert type(apart).__name__ == "BaseModelOutputWithPast" or name == "gpt2"
    logits = model.get_output_embeddings()(apart.last_hidden_state)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-12, atol=1e-12)
    found = gradients(model, logits)
    assert found.keys() == wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


def test_a_copy_runs_its_own_deltas_and_hooks_act_once(model_dir: Load) -> None:
    model = moved(peftc.apply("lora", model_dir("bert"), head="sequence-classification", num_labels=3))
    calls: list[int] = []
    with torch.no_grad():
        before = model.bert(**batch()).last_hidden_state
        copied = copy.deepcopy(model)
        moved(copied)
        assert not torch.equal(copied.bert(**batch()).last_hidden_state, before)
        handles = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for module in (model.bert, model.bert.encoder.layer[0])
        ]
        hooked = model.bert(**batch()).last_hidden_state
    for handle in handles:
        handle.remove()
    assert torch.equal(hooked, before)
    assert len(calls) == 2


def test_rows_that_reach_beyond_the_backbone_are_no_part_of_it(model_dir: Load) -> None:
    model = moved(peftc.apply(parse_rule(HEAD_TOO, "head.yaml"), model_dir("llama"), dtype=torch.float64))
    hidden = model(**batch(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model(**batch()).last_hidden_state, hidden, rtol=1e-12, atol=1e-12)


def test_a_rule_that_means_something_else_inside_is_refused() -> None:
    def plan(delta: str, path: str, *shape: int) -> Any:
        parameters = {"A": SimpleNamespace(name="A", shape=shape)}
        edit = SimpleNamespace(site=SimpleNamespace(path=path), delta=SimpleNamespace(name=delta), tap="out")
        return SimpleNamespace(parameters=parameters, edits=[edit])

    place = Place(None, "model", object)  # pyright: ignore[reportArgumentType]
    whole = plan("a", "model.layers.0", 2, 3)
    refuse_other(place, whole, whole)
    for part in (plan("a", "model.layers.0", 2, 4), plan("b", "model.layers.0", 2, 3), plan("a", "model.norm", 2, 3)):
        with pytest.raises(PeftcError, match=r"E041 error: `model` cannot be called by itself"):
            refuse_other(place, whole, part)
    none: Any = SimpleNamespace(parameters={}, edits=[])
    with pytest.raises(PeftcError, match=r"to `a` of out of the model"):
        refuse_other(place, plan("a", "", 2, 3), none)
