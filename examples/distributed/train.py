"""Train an adapted MiniLM on several processes: DDP or FSDP2 by the config file, nothing by the script.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py
    accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/train.py
    python examples/distributed/train.py

The task is that of `train_minilm.py`: are the words of this sentence in order? The batch is shared among the processes,
so all three take the same steps. The main process prints the losses and writes the deltas.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from on_cpu import prepare
from transformers import AutoTokenizer, Trainer, TrainingArguments

import peftc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from word_order import examples, minilm_dir


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized sentences with their class."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        rows, _ = examples(count, 2)
        self.encoded = tokenizer([row.text for row in rows], truncation=True, max_length=32)["input_ids"]
        self.labels = [row.label for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.encoded[index]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default=str(Path(__file__).resolve().parents[1] / "mam_classifier.yaml"))
    parser.add_argument("--out", default="distributed-out", help="where checkpoints and deltas go")
    parser.add_argument("--batch", type=int, default=16, help="sentences a step, all processes together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--resume", default=None, help="a checkpoint to go on from")
    options = parser.parse_args()

    on_cpu = prepare()
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    model = peftc.apply(options.rule, minilm_dir(), head="sequence-classification", num_labels=2)
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        activation_checkpointing=options.checkpointing,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu and not sharded,
        average_tokens_across_devices=False,  # every sentence counts once, however many tokens it has
        save_steps=options.save_steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Sentences(tokenizer, 400), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=options.resume)
    # on every process: a sharded model is gathered, and the main one writes
    model.save_pretrained(Path(options.out, "delta"), is_main_process=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        print("losses", *[f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry])
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # closes the process group: a process that leaves it open may abort at its end


if __name__ == "__main__":
    main()
