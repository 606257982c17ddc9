"""An adapted model is a model of its base's class: names, types, dtypes, copies, config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import peftc
from peftc.diagnostics import PeftcError
from peftc.lang.loader import parse_rule
from runtime.tiny import batch, moved

Load = Callable[..., Any]
MAM = {"l": 3, "r": 4}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def test_it_is_an_instance_of_its_own_class(adapted: Load) -> None:
    from transformers import BertForSequenceClassification, PreTrainedModel

    model = adapted("bert")
    assert isinstance(model, BertForSequenceClassification)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "PeftcBertForSequenceClassification"


def test_state_dict_has_the_bases_names_and_those_of_the_deltas(adapted: Load, plain: Load) -> None:
    model, base = adapted("bert", "mam", set=MAM), plain("bert")
    deltas = model.state_dict().keys() - base.state_dict().keys()
    assert base.state_dict().keys() <= model.state_dict().keys()
    assert deltas == set(model.surgery.plan.parameters)
    assert "bert.encoder.layer.0.attention.peftc.prefix.P_k" in deltas


def test_only_deltas_and_what_the_rule_trains_get_gradients(adapted: Load) -> None:
    model = adapted("bert", "mam", set=MAM)
    wanted = {*model.surgery.plan.parameters, *model.surgery.plan.trained}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    model(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
    model.zero_grad(set_to_none=True)


def test_config_is_the_bases(adapted: Load, plain: Load, model_dir: Load) -> None:
    for name in ("bert", "llama"):
        base = type(plain(name).config).from_pretrained(model_dir(name)).to_dict()
        mine = adapted(name).config.to_dict()
        assert {k: v for k, v in mine.items() if base.get(k) != v and k != "_name_or_path"} == {}
    assert adapted("llama").generation_config.use_cache is plain("llama").generation_config.use_cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_converted_model_computes_in_its_new_dtype(model_dir: Load, dtype: torch.dtype) -> None:
    model = moved(peftc.apply("mam", model_dir("bert"), set=MAM))
    before = logits(model)
    assert len(model.surgery.programs) == 1
    after = logits(model.to(dtype))
    assert len(model.surgery.programs) == 2
    assert after.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(after.to(torch.float32), before, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits(model.to(torch.float32)), before, rtol=tolerance, atol=tolerance)


def test_deltas_of_a_half_precision_base_train_in_float32(model_dir: Load) -> None:
    model = peftc.apply("mam", model_dir("bert"), set=MAM, dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if n in model.surgery.plan.parameters} == {torch.float32}
    result = model.train()(**batch(), labels=torch.tensor([0, 1, 2]))
    result.loss.backward()
    assert result.logits.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


NARROW = """\
peftc: 1
name: narrow
hyper: {r: 4}
deltas:
  d: {at: ffn, modify: out, form: "linear(linear(x, A), B)", params: {
    A: {shape: [r, d_in], init: normal(0.1), dtype: bfloat16}, B: {shape: [d_out, r], init: zeros}}}
"""


def test_deltas_with_a_dtype_of_their_own_follow_the_model(model_dir: Load) -> None:
    model = moved(peftc.apply(parse_rule(NARROW, "narrow.yaml"), model_dir("bert")))
    wide = copy.deepcopy(model).double()
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(wide).float(), logits(model), rtol=1e-5, atol=1e-5)
    exact = logits(wide)
    wide.to(torch.float32)
    torch.testing.assert_close(logits(wide).double(), exact, rtol=1e-5, atol=1e-5)
    assert len(wide.surgery.programs) == 3


def test_deep_copy_has_parameters_of_its_own(model_dir: Load) -> None:
    model = moved(peftc.apply("mam", model_dir("bert"), set=MAM))
    copied = copy.deepcopy(model)
    wanted = logits(model)
    assert torch.equal(logits(copied), wanted)
    moved(copied)
    assert not torch.equal(logits(copied), wanted)
    assert torch.equal(logits(model), wanted)


def test_tied_embeddings_stay_tied(model_dir: Load) -> None:
    model = peftc.apply("lora", model_dir("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_bfloat16_autocast_trains(model_dir: Load, name: str) -> None:
    model = peftc.apply("mam", model_dir(name), set=MAM)
    labels = torch.tensor([0, 1, 2]) if name == "bert" else batch()["input_ids"]
    exact = model(**batch(), labels=labels).loss.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch(), labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss.detach().float(), exact, rtol=0.02, atol=0.02)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert any(grad.any() for grad in grads)


def test_counts_are_printed(adapted: Load, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("bert", "mam", set=MAM)
    model.print_trainable_parameters()
    assert f"trainable params: {model.surgery.plan.trained_count:,} || all params: " in capsys.readouterr().out


def test_resizing_the_embeddings_is_refused(adapted: Load) -> None:
    with pytest.raises(PeftcError, match=r"E041 error: .*embeddings"):
        adapted("bert").resize_token_embeddings()
