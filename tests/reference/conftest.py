"""A tiny random BERT and BART on disk, and inputs with real padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.bart import bart
from reference.bert import bert
from reference.case import Case

SIZES = {"vocab_size": 99, "pad_token_id": 1, "max_position_embeddings": 40}


@pytest.fixture(scope="session", params=["bert", "bart"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param) / "model"
    return bert_case(directory) if request.param == "bert" else bart_case(directory)


def bert_case(directory: Path) -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SIZES)
    model = randomised(BertModel(config))
    model.save_pretrained(directory)
    inputs = padded_inputs()
    del inputs["decoder_input_ids"]
    return Case(
        "bert",
        directory,
        model,
        inputs,
        lambda state, method, given: bert(state, method, **given),
        lambda found: (found.last_hidden_state, found.pooler_output),
    )


def bart_case(directory: Path) -> Case:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        **SIZES,
    )
    model = randomised(BartForConditionalGeneration(config))
    model.save_pretrained(directory)
    return Case(
        "bart",
        directory,
        model,
        padded_inputs(),
        lambda state, method, given: (bart(state, method, **given),),
        lambda found: (found.logits,),
    )


def randomised(model: Any) -> Any:
    """Weights large enough that attention is far from uniform, biases and norms away from 0 and 1; in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scale else 0.15 * noise)
    return model.eval()


def padded_inputs() -> dict[str, Tensor]:
    """Three examples of 11, 7 and 3 tokens, padded to 11, and decoder inputs of 6."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(11) < torch.tensor([11, 7, 3])[:, None]).long()
    ids = torch.randint(3, 99, (3, 11), generator=generator)
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 99, (3, 6), generator=generator),
    }
