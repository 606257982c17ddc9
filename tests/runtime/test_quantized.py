"""A base in few bits: deltas train on it as on the rounded weights, which are never whole all at once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc import driver, quantization
from peftc.diagnostics import PeftcError
from peftc.runtime.quantized import forms_of, whole
from runtime.tiny import batch, moved

Load = Callable[..., Any]
FORMS = quantization.FORMS
SET: dict[str, dict[str, Any]] = {"lora": {"r": 4}, "dora": {"r": 4}, "mam": {"l": 3, "r": 4}}
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def quantized(model_dir: Load) -> Load:
    """Model, rule and form -> the adapted model with moved deltas; one for the module."""

    @functools.cache
    def make(name: str, rule: str, form: str) -> Any:
        return moved(peftc.apply(rule, model_dir(name), SET[rule], quantize=form))

    return make


@pytest.fixture(scope="module")
def rounded(model_dir: Load, quantized: Load) -> Load:
    """The same with plain weights, each the rounded one."""

    @functools.cache
    def make(name: str, rule: str, form: str) -> Any:
        model, other = peftc.apply(rule, model_dir(name), SET[rule]), quantized(name, rule, form)
        with torch.no_grad():
            for parameter in model.surgery.plan.parameters:
                model.get_parameter(parameter).copy_(other.get_parameter(parameter))
            for weight in forms_of(other):
                model.get_parameter(weight).copy_(whole(other, weight))
        return model

    return make


def by_hand(weight: torch.Tensor, form: str) -> torch.Tensor:
    """The rounded weight, entry by entry, by the definition of each form."""
    rows = []
    for row in weight.tolist():
        size = len(row) if form == "int8" else next(size for size in (64, 32, 16) if len(row) % size == 0)
        for start in range(0, len(row), size):
            part = row[start : start + size]
            largest = max(abs(entry) for entry in part)
            if form == "nf4":
                rows += [largest * min(LEVELS, key=lambda level: abs(level - entry / largest)) for entry in part]
            else:
                step = largest / (127 if form == "int8" else 7)
                rows += [step * round(entry / step) for entry in part]
    return torch.tensor(rows).reshape(weight.shape)


LEVELS = (  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 128), (7, 96), (3, 48)])
def test_a_weight_is_rounded_by_the_definition_of_its_form(form: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    data, scale = quantization.pack(weight, form)
    found = quantization.dequantize(data, scale, form, torch.float32)
    torch.testing.assert_close(found, by_hand(weight, form), rtol=1e-6, atol=1e-6)
    assert data.nbytes == weight.numel() // (1 if form == "int8" else 2)


def test_rows_of_zeros_stay_zero() -> None:
    for form in FORMS:
        data, scale = quantization.pack(torch.zeros(2, 32), form)
        assert (quantization.dequantize(data, scale, form, torch.float32) == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", ["out", "in"])
def test_a_linear_layer_is_exactly_that_of_the_weight_made_whole(form: str, stored: str) -> None:
    x = torch.randn(2, 3, 32 if stored == "out" else 6, requires_grad=True)
    bias = torch.randn(6 if stored == "out" else 32, requires_grad=True)
    data, scale = quantization.pack(torch.randn(6, 32), form)
    weight = quantization.dequantize(data, scale, form, torch.float32)
    found = quantization.linear(x, data, scale, bias, form, stored)
    expected = torch.nn.functional.linear(x, weight if stored == "out" else weight.t(), bias)
    assert torch.equal(found, expected)
    ours = torch.autograd.grad(found.square().sum(), (x, bias))
    theirs = torch.autograd.grad(expected.square().sum(), (x, bias))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch()).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "rule", "form"), [("llama", "lora", "nf4"), ("gpt2", "dora", "int8"), ("bert", "mam", "int4")]
)
def test_deltas_learn_as_on_the_rounded_weights(
    quantized: Load, rounded: Load, name: str, rule: str, form: str
) -> None:
    model, other = quantized(name, rule, form), rounded(name, rule, form)
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, other(**batch()).logits)
    ours, theirs = gradients(model), gradients(other)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in forms_of(model))


def test_the_base_takes_less_memory_and_is_never_whole(quantized: Load, rounded: Load) -> None:
    """What the forward pass keeps for the backward one holds no weight, where the plain model's holds them all."""
    bytes_of: dict[str, int] = {}
    kept: dict[str, set[tuple[int, ...]]] = {}
    for kind, model in {"nf4": quantized("llama", "lora", "nf4"), "plain": rounded("llama", "lora", "nf4")}.items():
        layers = [module for path, module in model.named_modules() if path.endswith("_proj")]
        bytes_of[kind] = sum(
            t.nbytes for m in layers for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        )
        kept[kind] = shapes = set()

        def keep(tensor: torch.Tensor, shapes: set[tuple[int, ...]] = shapes) -> torch.Tensor:
            if tensor.is_floating_point():
                shapes.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch()).logits.sum().backward()
    assert bytes_of["nf4"] < 0.26 * bytes_of["plain"]  # 4 bits and a float32 for 32 entries, of 32 bits
    weights = {(32, 32), (16, 32), (32, 16), (64, 32), (32, 64)}
    assert kept["plain"] & weights
    assert not kept["nf4"] & weights


def test_deltas_on_quantized_weights_run_module_by_module(quantized: Load) -> None:
    """A hook on each block has the graph run in parts: what a delta reads of a weight is made whole in its block."""
    model = copy.deepcopy(quantized("gpt2", "dora", "int8"))
    wanted, seen = gradients(model), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda *_: seen.append(1))
    ours = gradients(model)
    assert len(seen) == 2
    assert ours.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(ours[key], wanted[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_saved_deltas_load_on_the_base_rounded_again(quantized: Load, tmp_path: Path, form: str) -> None:
    model = quantized("llama", "lora", form)
    model.save_pretrained(tmp_path / "out")
    again: Any = peftc.load(tmp_path / "out")
    with pytest.warns(UserWarning, match="trained on .* weights, .* % from those"):
        plain: Any = peftc.load(tmp_path / "out", quantize="off")
    with torch.no_grad():
        expected = model(**batch()).logits
        assert torch.equal(again(**batch()).logits, expected)
        assert not torch.equal(plain(**batch()).logits, expected)
    assert not forms_of(plain)


def test_the_base_alone_generation_states_and_units_run_quantized(
    quantized: Load, rounded: Load, tmp_path: Path
) -> None:
    model, other = copy.deepcopy(quantized("llama", "lora", "nf4")), rounded("llama", "lora", "nf4")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch(2), **options), other.generate(**batch(2), **options))
    with torch.no_grad(), model.disable(), other.disable():
        torch.testing.assert_close(model(**batch()).logits, other(**batch()).logits, **NEAR)
    model.save_pretrained(tmp_path / "more")
    model.add("more", tmp_path / "more")
    with torch.no_grad(), model.mix({"default": 0.5, "more": 0.5}):
        torch.testing.assert_close(model(**batch()).logits, other(**batch()).logits, **NEAR)
    wanted = gradients(other)
    model.train()
    model.activation_checkpointing_enable()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4)


def test_a_merge_into_the_base_is_refused_and_one_into_the_rounded_weights_is_exact(
    quantized: Load, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    model = quantized("llama", "lora", "nf4")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(PeftcError, match=r"E055 .*nf4 weights, which differ from its base's by \d[\d.]* %"):
        driver.merge(tmp_path / "out", tmp_path / "merged")
    model.save_dequantized(tmp_path / "base", tmp_path / "deltas")
    driver.merge(tmp_path / "deltas", tmp_path / "merged")
    with torch.no_grad():
        expected = model(**batch()).logits
        assert torch.equal(peftc.load(tmp_path / "deltas")(**batch()).logits, expected)
        merged: Any = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_quantized_is_refused(model_dir: Load, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=r"E055 .*no quantized form `int3`"):
        peftc.apply("lora", model_dir("llama"), quantize="int3")
    peftc.apply("lora", model_dir("bert-base")).save_pretrained(tmp_path / "lora")
    peftc.apply("full", model_dir("bert-base")).save_pretrained(tmp_path / "full")
    model: Any = peftc.load(tmp_path / "lora", quantize="int8")
    with pytest.raises(PeftcError, match=r"E055 .*`full` trains .*quantized"):
        model.add("full", tmp_path / "full")
    whole_model: Any = peftc.load(tmp_path / "full", quantize="int8")
    assert not forms_of(whole_model), "what trains stays whole"


def test_a_checkpoint_that_another_tool_quantized_is_refused(model_dir: Load, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(model_dir("llama"), tmp_path / "given")
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "given" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PeftcError, match=r"E055 .*quantized already, by bitsandbytes"):
        peftc.apply("lora", tmp_path / "given")
    with pytest.raises(PeftcError, match=r"E055 .*quantized already"):
        driver.sites(tmp_path / "given")


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(16, 128)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    data, scale = quantization.pack(weight, "nf4")
    torch.testing.assert_close(scale.flatten(), state.absmax.flatten())
    expected = functional.dequantize_4bit(theirs, state)
    torch.testing.assert_close(quantization.dequantize(data, scale, "nf4", torch.float32), expected)


def test_autocast_treats_a_quantized_layer_as_a_whole_one(quantized: Load, rounded: Load) -> None:
    found = []
    for model in (quantized("llama", "lora", "nf4"), rounded("llama", "lora", "nf4")):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**batch()).logits
        logits.float().square().sum().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (ours, mine), (theirs, wanted) = found
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    for name, grad in wanted.items():
        assert (mine[name] - grad).norm() <= 2e-2 * grad.norm()


def test_a_bfloat16_base_is_rounded_from_its_own_values(model_dir: Load) -> None:
    model: Any = peftc.apply("lora", model_dir("llama"), SET["lora"], dtype=torch.bfloat16, quantize="int8")
    plain: Any = peftc.apply("lora", model_dir("llama"), SET["lora"], dtype=torch.bfloat16)
    for name in forms_of(model):
        weight = plain.get_parameter(name).detach()
        expected = by_hand(weight.float(), "int8").to(torch.bfloat16)
        step = weight.float().abs().amax(1, keepdim=True) / 127
        off = (whole(model, name) - expected).abs().float()
        assert (off > 0.1 * step).float().mean() < 0.01, "but where a value is half way between two levels"
        assert (off < 1.5 * step).all()
    with torch.no_grad():
        expected = plain(**batch()).logits
        found = model(**batch()).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 5e-2 * expected.norm()
