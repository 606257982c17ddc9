"""Three ways to teach MiniLM whether the words of a sentence are in order, and the way out to ONNX.

    python examples/train_minilm.py

Trains the same classifier on all-MiniLM-L6-v2 with its encoder frozen, with a MAM adapter, and with every parameter;
prints the accuracy of each; then exports the adapted model and predicts again in onnxruntime, without torch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from word_order import SHUFFLED, Example, examples, minilm_dir

import peftc
from peftc import driver

RULE = Path(__file__).with_name("mam_classifier.yaml")
LEARNING_RATES = {"frozen": 5e-3, "mam": 5e-4, "full": 1e-4}
SEED = 0


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized examples, short as they are: the collator pads each batch to its own longest."""

    def __init__(self, tokenizer: Any, rows: list[Example]) -> None:
        self.encoded = tokenizer([row.text for row in rows], truncation=True, max_length=32)["input_ids"]
        self.labels = [row.label for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.encoded[index]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.labels[index]}


def build(way: str) -> Any:
    """MiniLM with a new two-class head: encoder frozen, adapted by the MAM rule, or free to change."""
    set_seed(SEED)
    if way == "mam":
        return peftc.apply(RULE, minilm_dir(), head="sequence-classification", num_labels=2, seed=SEED)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_dir(), num_labels=2)
    if way == "frozen":
        model.base_model.requires_grad_(False)
    return model


def train(model: Any, way: str, tokenizer: Any, rows: list[Example], epochs: float, out: str) -> Trainer:
    """Train with the Hugging Face Trainer, the same number of steps for each way."""
    arguments = TrainingArguments(
        output_dir=out,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
        learning_rate=LEARNING_RATES[way],
        warmup_steps=0.1,
        weight_decay=0.0,
        seed=SEED,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Sentences(tokenizer, rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def predictions(trainer: Trainer, tokenizer: Any, rows: list[Example]) -> np.ndarray:
    """The class that torch gives to each row."""
    return np.asarray(trainer.predict(Sentences(tokenizer, rows)).predictions).argmax(-1)  # pyright: ignore[reportArgumentType]


def onnx_predictions(model: Path, tokenizer: Any, rows: list[Example], batch: int = 64) -> np.ndarray:
    """The class that onnxruntime gives to each row."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}
    classes = []
    for start in range(0, len(rows), batch):
        encoded = tokenizer([row.text for row in rows[start : start + batch]], padding=True, return_tensors="np")
        feed = {name: value for name, value in encoded.items() if name in wanted}
        classes.append(np.asarray(session.run(["logits"], feed)[0]).argmax(-1))
    return np.concatenate(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=3000, help="sentences to train on")
    parser.add_argument("--test", type=int, default=800, help="sentences to test on")
    parser.add_argument("--epochs", type=float, default=2.0)
    options = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    rows, held_out = examples(options.train, options.test)
    truth = np.array([row.label for row in held_out])
    shuffled = next(row.text for row in rows if row.label == SHUFFLED)
    print(f"{len(rows)} sentences to train on, {len(held_out)} to test; out of order: {shuffled!r}\n")

    adapted = None
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'encoder':<8} {'trained':>12} {'accuracy':>9} {'seconds':>8}")
        for way in LEARNING_RATES:
            start = time.perf_counter()
            model = build(way)
            trainer = train(model, way, tokenizer, rows, options.epochs, folder)
            guessed = predictions(trainer, tokenizer, held_out)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            accuracy = (guessed == truth).mean()
            print(f"{way:<8} {trained:>12,} {accuracy:>9.3f} {time.perf_counter() - start:>8.0f}", flush=True)
            if way == "mam":
                adapted = guessed
                model.save_pretrained(Path(folder, "delta"))

        driver.merge(Path(folder, "delta"), Path(folder, "merged"), export={"onnx"})
        again = onnx_predictions(Path(folder, "merged", "model.onnx"), tokenizer, held_out)
    same = int((again == adapted).sum())
    print(f"\nonnxruntime: accuracy {(again == truth).mean():.3f}, the same class as torch for {same} of {len(truth)}")


if __name__ == "__main__":
    main()
