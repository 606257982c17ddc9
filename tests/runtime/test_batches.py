"""Batches: what a padded, packed, accumulated or smoothed batch gives is what its rows give one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import peftc
from runtime.test_trainer import collate, rows, trainer
from runtime.tiny import VOCABULARY, moved

Load = Callable[..., Any]
SLOW = pytest.mark.slow
MAM = {"l": 3, "r": 4}
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
"""float64, up to the order of sums."""


@pytest.fixture(scope="module")
def exact(model_dir: Load) -> Load:
    """Kind -> the model with MAM in float64, every delta moved, dropout off; traced once for the module."""
    made: dict[str, Any] = {}

    def model(kind: str) -> Any:
        if kind not in made:
            made[kind] = moved(peftc.apply("mam", model_dir(kind), set=MAM, dtype=torch.float64)).eval()
        return made[kind]

    return model


def token_losses(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Cross entropy, summed: of the class, of the next token, or of the target's token."""
    if kind == "llama" or kind == "gpt2":
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.shape[-1]
    return cross_entropy(logits.reshape(-1, classes).double(), labels.reshape(-1), ignore_index=-100, reduction="sum")


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True))


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("bert", "gpt2", "bart"))]
)
def test_a_padded_batch_is_the_sum_of_its_rows(exact: Load, kind: str) -> None:
    """The loss and the gradient of every delta; a row by itself has neither padding nor a mask."""
    model, given = exact(kind), rows(5, kind)
    batch = collate(given)
    whole = token_losses(model(**batch).logits, batch["labels"], kind)
    alone = torch.zeros(())
    for row in given:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        extra = {"labels": labels} if kind == "bart" else {}
        alone = alone + token_losses(model(input_ids=ids, **extra).logits, labels, kind)
    torch.testing.assert_close(whole, alone, **EXACT)
    wanted = gradients(model, alone)
    for name, value in gradients(model, whole).items():
        torch.testing.assert_close(value, wanted[name], **EXACT)


def test_packed_rows_with_position_ids_are_the_rows_apart(exact: Load) -> None:
    """No mask is given: where positions begin anew a row ends, as in transformers' own models and collators."""
    from transformers import DataCollatorWithFlattening

    model = exact("llama")
    given = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(5, "llama")]
    packed = DataCollatorWithFlattening(return_position_ids=True, return_tensors="pt")(given)
    found = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in given])
    torch.testing.assert_close(found, alone, **EXACT)
    loss = token_losses(found[None], packed["labels"], "llama")
    rows_apart = sum(
        token_losses(model(input_ids=ids[None]).logits, ids[None], "llama")
        for ids in (torch.tensor(row["input_ids"]) for row in given)
    )
    torch.testing.assert_close(loss, rows_apart, **EXACT)
    wanted = gradients(model, rows_apart)
    for name, value in gradients(model, loss).items():
        torch.testing.assert_close(value, wanted[name], **EXACT)


@SLOW
def test_accumulated_batches_step_as_one_large_batch(model_dir: Load, tmp_path: Path) -> None:
    """Rows of unequal length, 4 times 2 of them or 8 at once: every token weighs the same. Losses are float32.

    Not BART, whose loss ignores how many tokens a step has, so that the Trainer logs it multiplied, plain or adapted.
    """
    found = []
    for name, size, times in (("large", 8, 1), ("small", 2, 4)):
        model = peftc.apply("mam", model_dir("llama"), set=MAM, dtype=torch.float64)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "optim": "sgd"}
        run = trainer(model, tmp_path / name, "llama", eval_strategy="no", save_strategy="no", **settings)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found.append((losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    (losses, deltas), (wanted_losses, wanted) = found
    assert len(losses) == 4
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(deltas[name], value, rtol=1e-5, atol=1e-8)


SETTINGS: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing_factor": 0.2},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "bf16": {"bf16": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in SETTINGS])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_settings_of_the_trainer_act_as_on_the_plain_model(
    model_dir: Load, plain: Load, tmp_path: Path, name: str
) -> None:
    """A delta that starts at zero and a learning rate of 0: every loss that is logged is the plain model's."""
    losses = []
    for which, model in (("adapted", peftc.apply("lora", model_dir("llama"))), ("plain", plain("llama"))):
        settings = {"learning_rate": 0.0, "max_steps": 3, "save_strategy": "no", **SETTINGS[name]}
        run = trainer(model, tmp_path / which, "llama", **settings)
        run.train()
        history = run.state.log_history
        losses.append([entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) >= 4


def test_smoothed_loss_of_the_trainer_is_the_formula(model_dir: Load, tmp_path: Path) -> None:
    """(1 - e) times the cross entropy of the next token plus e times its mean over the vocabulary."""
    model = moved(peftc.apply("lora", model_dir("llama")))
    run = trainer(model, tmp_path, "llama", label_smoothing_factor=0.2, save_strategy="no", eval_strategy="no")
    given = collate(rows(4, "llama"))
    found = run.compute_loss(model, dict(given))
    labels = given["labels"][:, 1:]
    scores = -torch.log_softmax(model(**{k: v for k, v in given.items() if k != "labels"}).logits[:, :-1], -1)
    kept = labels != -100
    exact = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].mean()
    spread = scores.sum(-1)[kept].mean() / VOCABULARY
    torch.testing.assert_close(found, 0.8 * exact + 0.2 * spread, rtol=1e-5, atol=1e-6)
