"""Models that drop whole paths in training keep every one in evaluation, and draw the same ones as their base."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import peftc
from families.family import randomised


def test_stochastic_depth_is_off_in_evaluation_and_the_bases_in_training(tmp_path: Path) -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.5
    )
    plain = randomised(transformers.SwinForImageClassification(config))
    plain.save_pretrained(tmp_path)
    adapted = peftc.apply("lora", tmp_path, set={"r": 4})
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(adapted(images).logits, plain(images).logits)
        torch.manual_seed(3)
        expected = plain.train()(images).logits
        torch.manual_seed(3)
        assert torch.equal(adapted.train()(images).logits, expected)
        assert not torch.equal(expected, plain(images).logits)
