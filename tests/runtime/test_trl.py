"""TRL's SFTTrainer, unmodified, on an adapted model. The reference is HF peft's LoRA in the same trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from runtime.tiny import MAKERS, VOCABULARY

pytest.importorskip("trl", reason="trl has no wheel for Python 3.10")
peft: Any = pytest.importorskip("peft")

Load = Callable[..., Any]
STEPS = 3


def tokenizer() -> Any:
    """A word a token; built here, for nothing is fetched."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(VOCABULARY - 4))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def texts(*, prompts: bool = False) -> Any:
    from datasets import Dataset

    rows = [" ".join(f"w{(7 * row + word) % 95}" for word in range(3 + row % 5)) for row in range(16)]
    return Dataset.from_list([{"prompt": row, "completion": " w5 w6"} if prompts else {"text": row} for row in rows])


def sft(model: Any, out: Path, **settings: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    config = SFTConfig(**{**defaults, **settings})
    prompts = bool(settings.get("completion_only_loss"))
    run = SFTTrainer(
        model, config, train_dataset=texts(prompts=prompts), processing_class=tokenizer(), peft_config=None
    )
    run.train()
    return run


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def pair(model_dir: Load) -> Callable[[], tuple[Any, Any]]:
    """The same LoRA twice, ours and peft's, with equal starts at each call; ours is traced once for the module."""
    ours = peftc.apply("lora", model_dir("llama"), set={"r": 4, "alpha": 8.0})
    start = {name: p.detach().clone() for name, p in ours.named_parameters() if p.requires_grad}

    def made() -> tuple[Any, Any]:
        base = type(MAKERS["llama"]()).from_pretrained(model_dir("llama"))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, value in start.items():
                ours.get_parameter(name).copy_(value)
                counterpart(theirs, name).copy_(value)
        return ours, theirs

    return made


def counterpart(theirs: Any, name: str) -> Tensor:
    """model.layers.0.self_attn.peftc.lora.q.A is ...self_attn.q_proj.lora_A.default.weight in peft."""
    path, _, rest = name.partition(".peftc.lora.")
    role, matrix = rest.split(".")
    return theirs.get_parameter(f"base_model.model.{path}.{role}_proj.lora_{matrix}.default.weight")


WAYS = {
    "plain": {},
    "completion only": {"completion_only_loss": True},
    "packed": {"packing": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "dft": {"loss_type": "dft"},
}


SLOW = {
    "smoothed": [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is dep:FutureWarning")],
    "dft": [pytest.mark.slow],
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=SLOW.get(way, [])) for way in WAYS])
def test_sft_loses_and_learns_what_pefts_lora_does(pair: Any, tmp_path: Path, way: str) -> None:
    """Same losses, and same matrices after three steps of AdamW; float32, so up to rounding."""
    ours, theirs = pair()
    found, wanted = (sft(model, tmp_path / str(index), **WAYS[way]) for index, model in enumerate((ours, theirs)))
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    assert len(losses(found)) == STEPS
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), counterpart(theirs, name).detach(), rtol=1e-3, atol=1e-5)
    assert len(ours.surgery.programs) <= 4, "no batch is a trace of its own"


def test_checkpoint_of_sft_is_a_delta_directory(pair: Any, tmp_path: Path) -> None:
    ours, _ = pair()
    sft(ours, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    stored = peftc.load(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in ours.state_dict().items())
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
