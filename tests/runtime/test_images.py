"""An image beside a text, for a model whose deltas were planned from text: a vision tower, projector and Llama."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families.family import fill, randomised

import peftc

IMAGE, PATCHES = 50, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    words = LlamaConfig(vocab_size=99, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=words, image_token_id=IMAGE, image_seq_length=PATCHES)
    directory = tmp_path_factory.mktemp("llava")
    randomised(LlavaForConditionalGeneration(config)).double().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    adapted: Any = peftc.apply("lora", base, set={"r": 2}, dtype=torch.float64)
    for parameter in fill(adapted).values():
        parameter.data.mul_(3)
    return adapted


def asked(images: int) -> dict[str, torch.Tensor]:
    """Two texts; all images are in the first, or one in each of both."""
    torch.manual_seed(4)
    ids = torch.randint(3, 40, (2, 2 * PATCHES + 3))
    if images == 2:
        ids[:, :PATCHES] = IMAGE
    else:
        ids[0, : images * PATCHES] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, 16, 16, dtype=torch.float64),
    }


def merged_by_hand(model: Any, base: Path) -> Any:
    """The base with W + alpha / r * up down at each projection that has them, by transformers alone."""
    from transformers import LlavaForConditionalGeneration

    plain = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float64)
    deltas = dict(model.named_parameters())
    alpha, rank = 16, 2
    ups = [name for name in deltas if name.endswith(".B")]
    assert len(ups) == 4
    for up in ups:
        attention, tap = re.fullmatch(r"(.*)\.peftc\.lora\.(.)\.B", up).groups()  # pyright: ignore[reportOptionalMemberAccess]
        change = deltas[up] @ deltas[up[:-1] + "A"]
        plain.get_submodule(f"{attention}.{tap}_proj").weight.data += alpha / rank * change.detach()
    return plain


@pytest.mark.filterwarnings("ignore:.*traced anew for each number of images")
@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_call_with_images_has_the_deltas_of_the_text(model: Any, base: Path, images: int) -> None:
    assert not any("vision" in name for name in model.surgery.plan.parameters)
    (fact,) = model.surgery.plan.unreached
    assert fact.modules == ("model.vision_tower", "model.multi_modal_projector")
    call = asked(images)
    with torch.no_grad():
        expected = merged_by_hand(model, base)(**call).logits
        torch.testing.assert_close(model(**call).logits, expected, rtol=0, atol=1e-10)
        without = {**call, "pixel_values": -call["pixel_values"]}
        assert not torch.allclose(model(**without).logits, expected), "it sees the image"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*traced anew for each number of images")
def test_a_model_writes_after_an_image_what_its_merged_base_writes(model: Any, base: Path) -> None:
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    call = asked(2)
    found = model.generate(**call, **settings)
    assert torch.equal(found, merged_by_hand(model, base).generate(**call, **settings))
    other = model.generate(**{**call, "pixel_values": -call["pixel_values"]}, **settings)
    assert not torch.equal(other, found), "what it writes depends on the image"
