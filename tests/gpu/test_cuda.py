"""An adapted model on a GPU is the one on the CPU: answers, gradients, generation, states, in every dtype.

`PEFTC_TEST_DEVICE=cpu` runs them on the CPU, to see that the tests themselves are right.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.tiny import batch, moved, seq2seq_batch

import peftc

DEVICE = os.environ.get("PEFTC_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

Load = Callable[..., Any]
RULES: dict[str, dict[str, Any]] = {"lora": {"r": 4}, "mam": {"l": 3, "r": 4}, "dora": {"r": 4}}
INPUTS = {"bert": batch, "llama": batch, "gpt2": batch, "bart": seq2seq_batch}
NEAR: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def there(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def saved(model_dir: Load, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Model and rule -> a trained delta directory."""
    root = tmp_path_factory.mktemp("gpu")

    def directory(base: str, rule: str) -> Path:
        target = root / f"{base}-{rule}"
        if not target.exists():
            moved(peftc.apply(rule, model_dir(base), RULES[rule])).save_pretrained(target)
        return target

    return directory


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).logits.float().square().sum().backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", INPUTS)
def test_model_that_moves_is_the_model_that_stays(saved: Load, base: str, rule: str) -> None:
    model: Any = peftc.load(saved(base, rule))
    inputs = INPUTS[base]()
    with torch.no_grad():
        expected = model(**inputs).logits
    wanted, traces = gradients(model, inputs), dict(model.surgery.programs)
    model.to(DEVICE)
    with torch.no_grad():
        found = model(**there(inputs)).logits
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), expected, **NEAR)
    ours = gradients(model, there(inputs))
    assert ours.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-2, atol=1e-2)
    assert model.surgery.programs == traces, "a device is no reason to trace"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_answers_near_float32(saved: Load, dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = peftc.load(saved("llama", "mam"))(**batch()).logits
        model = peftc.load(saved("llama", "mam"), dtype=dtype, device=DEVICE)
        found = model(**there(batch())).logits
    assert found.dtype == dtype
    near = 5e-2 if dtype.itemsize == 2 else 1e-4
    assert (found.cpu().float() - expected).norm() < near * expected.norm()


@pytest.mark.parametrize("base", ["llama", "bart"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}])
def test_generation_writes_the_same_tokens(saved: Load, base: str, options: dict[str, Any]) -> None:
    inputs = {name: tensor.flip(1) for name, tensor in batch(3, 6).items()}
    model: Any = peftc.load(saved(base, "lora"), dtype=torch.float64)
    expected = model.generate(**inputs, max_new_tokens=6, **options)
    model.to(DEVICE)
    assert torch.equal(model.generate(**there(inputs), max_new_tokens=6, **options).cpu(), expected)


def test_states_are_added_mixed_and_chosen_by_row(saved: Load) -> None:
    model: Any = peftc.load(saved("llama", "lora"), device=DEVICE)
    model.add("mam", saved("llama", "mam"))
    other: Any = peftc.load(saved("llama", "lora"))
    other.add("mam", saved("llama", "mam"))
    with torch.no_grad():
        with model.per_sample(["mam", None, "default"]), other.per_sample(["mam", None, "default"]):
            torch.testing.assert_close(model(**there(batch())).logits.cpu(), other(**batch()).logits, **NEAR)
        weights = {"default": 0.6, "mam": 0.5}
        with model.mix(weights), other.mix(weights):
            torch.testing.assert_close(model(**there(batch())).logits.cpu(), other(**batch()).logits, **NEAR)


def test_what_was_trained_there_is_saved_for_anywhere(saved: Load, tmp_path: Path) -> None:
    model: Any = peftc.load(saved("bert", "mam"), device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**there(batch()), labels=torch.tensor([0, 1, 2], device=DEVICE)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = peftc.load(tmp_path / "out")(**batch()).logits
        torch.testing.assert_close(found, model(**there(batch())).logits.cpu(), **NEAR)
