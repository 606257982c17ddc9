"""transformers' Trainer, unmodified, trains an adapted model: losses, evaluation, checkpoints, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from runtime.tiny import batch

Load = Callable[..., Any]
MAM = {"l": 3, "r": 4}
KINDS = [pytest.param("bert", marks=pytest.mark.slow), "llama", pytest.param("bart", marks=pytest.mark.slow)]


def rows(count: int, kind: str) -> list[dict[str, Any]]:
    """Texts of 4 to 8 tokens; labels are a class, or the text itself."""
    given = batch(count, 8)["input_ids"].clamp(min=3)
    texts = [row[: 4 + index % 5].tolist() for index, row in enumerate(given)]
    return [{"input_ids": ids, "labels": n % 3 if kind == "bert" else ids} for n, ids in enumerate(texts)]


def collate(given: list[dict[str, Any]]) -> dict[str, Tensor]:
    def padded(texts: list[list[int]], value: int) -> Tensor:
        width = max(map(len, texts))
        return torch.tensor([text + [value] * (width - len(text)) for text in texts])

    texts = [row["input_ids"] for row in given]
    labels = [row["labels"] for row in given]
    return {
        "input_ids": padded(texts, 0),
        "attention_mask": padded([[1] * len(text) for text in texts], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else padded(labels, -100),
    }


def trainer(model: Any, out: Path, kind: str, **settings: Any) -> Any:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    cls, arguments = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if kind == "bart" else (Trainer, TrainingArguments)
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_strategy": "steps",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(
        model=model,
        args=arguments(**{**defaults, **settings}),
        train_dataset=rows(16, kind),
        eval_dataset=rows(6, kind),
        data_collator=collate,
        compute_metrics=lambda result: {"rows": len(result.label_ids)},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_evaluates_predicts_and_saves(model_dir: Load, tmp_path: Path, kind: str) -> None:
    model = peftc.apply("mam", model_dir(kind), set=MAM)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path, kind, load_best_model_at_end=True, metric_for_best_model="loss")
    first = run.evaluate()
    run.train()
    last = run.evaluate()
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_rows"] == 6
    predicted = run.predict(rows(5, kind)).predictions
    assert len(predicted[0] if isinstance(predicted, tuple) else predicted) == 5
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert "optimizer.pt" in {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    run.save_model(str(tmp_path / "final"))
    given = collate(rows(5, kind))
    assert torch.equal(peftc.load(tmp_path / "final")(**given).logits, model.eval()(**given).logits)
    assert len(model.surgery.programs) <= 4, "batches of any size run the same traces"


@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_losses_of_a_run_are_those_of_the_plain_model(model_dir: Load, plain: Load, tmp_path: Path, kind: str) -> None:
    """With a learning rate of 0 the Trainer logs the base's losses, up to dropout: it counts and accumulates alike."""
    losses = []
    for name, model in (("adapted", peftc.apply("lora", model_dir(kind))), ("plain", plain(kind))):
        run = trainer(model, tmp_path / name, kind, learning_rate=0.0, max_steps=2, save_strategy="no")
        run.train()
        losses.append(
            [entry[name] for entry in run.state.log_history for name in ("loss", "eval_loss") if name in entry]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if kind == "llama" else 0.05)


@pytest.mark.slow
def test_resumed_run_ends_where_the_whole_run_ends(model_dir: Load, tmp_path: Path) -> None:
    ends = []
    for out, steps, resume in (("whole", 4, None), ("halves", 2, None), ("halves", 4, "checkpoint-2")):
        model = peftc.apply("mam", model_dir("llama"), set=MAM)
        run = trainer(model, tmp_path / out, "llama", max_steps=steps, lr_scheduler_type="constant")
        run.train(resume_from_checkpoint=str(tmp_path / out / resume) if resume else None)
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    whole, _, resumed = ends
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


@pytest.mark.slow
def test_best_model_is_loaded_at_the_end(model_dir: Load, tmp_path: Path) -> None:
    model = peftc.apply("mam", model_dir("llama"), set=MAM)
    best_first = {"metric_for_best_model": "loss", "greater_is_better": True}  # the worst, then: the first one
    run = trainer(model, tmp_path, "llama", load_best_model_at_end=True, save_steps=1, eval_steps=1, **best_first)
    run.train()
    losses = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = max(losses, key=losses.__getitem__)
    assert best < 4
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best])
    stored = peftc.load(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in model.state_dict().items())


def test_resuming_names_no_frozen_tensor_as_missing(
    model_dir: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = peftc.apply("lora", model_dir("bert"))
    run = trainer(model, tmp_path, "bert", max_steps=2, eval_strategy="no")
    run.train()
    run.args.max_steps = 3
    caplog.clear()
    run.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text


def test_activation_checkpointing_changes_no_loss(model_dir: Load, tmp_path: Path) -> None:
    losses = []
    for name, settings in (("plain", {}), ("again", {"activation_checkpointing": True})):
        model = peftc.apply("mam", model_dir("bert"), set=MAM)
        run = trainer(model, tmp_path / name, "bert", max_steps=2, save_strategy="no", eval_strategy="no", **settings)
        run.train()
        assert model.is_activation_checkpointing == (name == "again")
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
