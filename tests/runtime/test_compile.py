"""torch.compile of an adapted model: one graph once a call was seen, the same numbers, in training too."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from runtime.test_trainer import trainer
from runtime.tiny import batch, moved

Load = Callable[..., Any]
MAM = {"l": 3, "r": 4}
ONLY_WITH_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def loss_and_gradients(model: Any, called: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = called(**batch(), labels=labels).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    "kind", ["bert", pytest.param("llama", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_compiled_model_is_the_eager_one_bit_for_bit(model_dir: Load, kind: str) -> None:
    """With the eager kernels (`aot_eager`); any warning is an error here."""
    model = moved(peftc.apply("mam", model_dir(kind), set=MAM)).eval()
    labels = torch.tensor([0, 2, 1]) if kind == "bert" else batch()["input_ids"]
    eager = copy.deepcopy(model)
    wanted = loss_and_gradients(eager, eager, labels)
    first = torch.compile(model, backend="aot_eager")(**batch(), labels=labels)  # traces the model in its midst
    assert torch.equal(first.loss, wanted["loss"])
    found = loss_and_gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), labels)
    assert found.keys() == wanted.keys() >= {"loss", *model.surgery.plan.trainable}
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@ONLY_WITH_COMPILER
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_computes_the_same_up_to_rounding(model_dir: Load) -> None:
    model = moved(peftc.apply("mam", model_dir("llama"), set=MAM)).eval()
    eager = copy.deepcopy(model)
    wanted = loss_and_gradients(eager, eager, batch()["input_ids"])
    found = loss_and_gradients(model, torch.compile(model), batch()["input_ids"])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_trainer_with_torch_compile_logs_the_same_losses(model_dir: Load, tmp_path: Path) -> None:
    """`torch_compile=True`, batches of several lengths: with eager kernels the losses are equal bit for bit."""
    losses = []
    for name, settings in (("eager", {}), ("compiled", {"torch_compile_backend": "aot_eager", "torch_compile": True})):
        model = peftc.apply("mam", model_dir("llama"), set=MAM)
        run = trainer(model, tmp_path / name, "llama", eval_strategy="no", save_strategy="no", **settings)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        run.save_model(str(tmp_path / name / "delta"))
    assert losses[0] == losses[1]
    deltas = [(tmp_path / name / "delta" / "delta.safetensors").read_bytes() for name in ("eager", "compiled")]
    assert deltas[0] == deltas[1]
