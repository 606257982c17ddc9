"""transformers' Trainer and TRL's trainers, unmodified, on adapted models; nothing is fetched.

    python examples/trainer.py
    accelerate launch --config_file examples/distributed/ddp.yaml examples/trainer.py --out two

Trainer and TRL's RewardTrainer train all-MiniLM-L6-v2 to tell whether the words of a sentence are in order, SFTTrainer
a tiny Llama, made here, to continue sentences. Each run prints its parameters and losses and writes its deltas. Run it
again with more --steps and it goes on from the newest whole checkpoint, wherever it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from word_order import INTACT, examples, minilm_dir

import peftc

RULE = Path(__file__).with_name("mam_classifier.yaml")
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
EXACT = "--exact" in sys.argv
"""Whether dropout is off, so that two processes do what one does, up to the order of sums."""


def settings(out: Path, steps: int) -> dict[str, Any]:
    """What all the runs are told; a batch is shared among the processes."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 16 // PROCESSES,
        "dataloader_drop_last": True,  # or two processes would fill up the last batch of an epoch
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "save_steps": 10,
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }


def run(name: str, out: Path, make: Callable[[], Any], trainer: Callable[[Any], Trainer]) -> None:
    """Make a model, or load it as the newest whole checkpoint has it, train it and write its deltas."""
    newest = peftc.last_checkpoint(out)
    model: Any = peftc.load(newest) if newest else make()
    for module in model.modules():
        if EXACT and isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    runner = trainer(model)
    runner.remove_callback(transformers.PrinterCallback)
    runner.train(resume_from_checkpoint=newest)
    runner.save_model(str(out / "delta"))  # the main process writes
    if runner.is_world_process_zero():
        losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
        print(f"\n{name}{f', resumed from {Path(newest).name}' if newest else ''}")
        model.print_trainable_parameters()
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps; wrote {out / 'delta'}", flush=True)


def classify(out: Path, steps: int) -> None:
    """Trainer: is this sentence in order?"""
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    rows, _ = examples(400, 2)
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=32)["input_ids"]
    data = [{"input_ids": ids, "labels": row.label} for ids, row in zip(encoded, rows, strict=True)]

    def make() -> Any:
        return peftc.apply(RULE, minilm_dir(), head="sequence-classification", num_labels=2)

    # every sentence counts once, however many tokens it has
    arguments = transformers.TrainingArguments(**settings(out, steps), average_tokens_across_devices=False)

    def trainer(model: Any) -> Trainer:
        return Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)  # pyright: ignore[reportArgumentType]

    run("Trainer on MiniLM", out, make, trainer)


def prefer(out: Path, steps: int) -> None:
    """TRL's RewardTrainer: a sentence in order is better than one that is not."""
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportPrivateImportUsage]

    rows, _ = examples(400, 2)
    intact, shuffled = ([row.text for row in rows if (row.label == INTACT) == want] for want in (True, False))
    pairs = Dataset.from_list(
        [{"chosen": one, "rejected": other} for one, other in zip(intact, shuffled, strict=False)]
    )

    def make() -> Any:
        return peftc.apply(RULE, minilm_dir(), head="sequence-classification", num_labels=1)

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    arguments = RewardConfig(**settings(out, steps), max_length=32, eos_token="[SEP]")

    def trainer(model: Any) -> Trainer:
        return RewardTrainer(model, arguments, train_dataset=pairs, processing_class=tokenizer)

    run("RewardTrainer on MiniLM", out, make, trainer)


def speak(out: Path, steps: int) -> None:
    """TRL's SFTTrainer: continue sentences, with LoRA on every linear layer and packed rows."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    texts = [row.text for row in examples(400, 2)[0]]
    data = Dataset.from_list([{"text": text} for text in texts])
    arguments = SFTConfig(**settings(out, steps), max_length=64, packing=True)
    with arguments.main_process_first():
        base, tokenizer = tiny_llama(out / "base", texts)

    def trainer(model: Any) -> Trainer:
        return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)

    run("SFTTrainer on a tiny Llama", out, lambda: peftc.apply("lora_linear", base), trainer)


def tiny_llama(place: Path, texts: list[str]) -> tuple[Path, Any]:
    """A random Llama of two layers on disk, and a tokenizer of the words of `texts`."""
    words = sorted({word for text in texts for word in text.split()})
    tokens = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    plain = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if not (place / "config.json").exists():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        }
        ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, **ids)).save_pretrained(place)
    return place, PreTrainedTokenizerFast(tokenizer_object=plain, **marks)


RUNS = {"classify": classify, "prefer": prefer, "speak": speak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"some of {', '.join(RUNS)}; all without one")
    parser.add_argument("--out", type=Path, default=Path("trainer-out"), help="where checkpoints and deltas go")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--exact", action="store_true", help="no dropout: two processes log the losses of one")
    options = parser.parse_args()
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no run is called {', '.join(unknown)}; there are {', '.join(RUNS)}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    for name in options.runs or RUNS:
        RUNS[name](options.out / name, options.steps)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a process that leaves it open may abort at its end


if __name__ == "__main__":
    main()
