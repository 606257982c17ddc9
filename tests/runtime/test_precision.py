"""A bfloat16 base with float32 deltas, and bfloat16 autocast: held to HF peft and to the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftc
from runtime.test_trainer import trainer
from runtime.tiny import batch, moved

Load = Callable[..., Any]
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def half(model_dir: Load) -> Any:
    """LoRA on a Llama in bfloat16, deltas moved; traced once for the module, trained by nobody."""
    return moved(peftc.apply("lora", model_dir("llama"), set={"r": 4, "alpha": 8.0}, dtype=BF16))


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every trained tensor for one fixed direction."""
    logits = model(**batch()).logits
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits.dtype)
    found = torch.autograd.grad((logits * noise).float().sum(), [model.get_parameter(name) for name in names])
    return logits, dict(zip(names, found, strict=True))


def counterpart(name: str) -> str:
    path, _, rest = name.partition(".peftc.lora.")
    role, matrix = rest.split(".")
    return f"base_model.model.{path}.{role}_proj.lora_{matrix}.default.weight"


def test_float32_deltas_on_a_bfloat16_base_are_pefts_bit_for_bit(half: Any, model_dir: Load) -> None:
    """peft keeps its adapters in float32 as well: outputs and the gradients of every matrix."""
    peft: Any = pytest.importorskip("peft")
    base = half.surgery.base_class.from_pretrained(model_dir("llama"), dtype=BF16)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name in half.surgery.plan.parameters:
            theirs.get_parameter(counterpart(name)).copy_(half.get_parameter(name))
    (logits, found), (wanted_logits, wanted) = gradients(half), gradients(theirs)
    assert logits.dtype == wanted_logits.dtype == BF16
    assert torch.equal(logits, wanted_logits)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[counterpart(name)]), name


def test_autocast_is_that_of_the_plain_model(model_dir: Load, plain: Load) -> None:
    """A LoRA that starts at zero under autocast: the plain model's logits, bit for bit; float32 gradients."""
    model, base = peftc.apply("lora", model_dir("llama")), plain("llama")
    with torch.autocast("cpu", dtype=BF16):
        logits, found = gradients(model)
        wanted = base(**batch()).logits
    assert logits.dtype == wanted.dtype == BF16
    assert torch.equal(logits, wanted)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(value.any() for name, value in found.items() if name.endswith(".B"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["bf16 weights", "and bf16 autocast"])
def test_trainer_moves_float32_deltas_by_less_than_bfloat16_can_hold(
    model_dir: Load, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = moved(peftc.apply("lora", model_dir("llama"), set={"r": 4}, dtype=BF16))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    trainer(model, tmp_path, "llama", max_steps=2, **options, **settings).train()
    stored = load_file(tmp_path / "checkpoint-2" / "delta.safetensors")
    for name, parameter in model.named_parameters():
        old = before[name]
        assert parameter.dtype == old.dtype == (torch.float32 if parameter.requires_grad else BF16), name
        if not parameter.requires_grad:
            assert torch.equal(parameter, old), name
            continue
        step = (parameter - old).abs()
        assert 0 < step.max() < 3e-6, "Adam's step is the learning rate"
        lost = old.to(BF16) - torch.sign(old - parameter).to(BF16) * 2e-6 == old.to(BF16)
        assert lost.float().mean() > 0.9, "the same step of a bfloat16 weight is rounded away"
        assert torch.equal(stored[name], parameter.detach())
