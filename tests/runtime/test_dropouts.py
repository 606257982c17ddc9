"""Dropout modules that are changed after a model was traced act in its graph as they do in the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import peftc
from runtime.tiny import batch

Load = Callable[..., Any]


def dropouts(model: Any) -> list[torch.nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return model.train()(**batch()).logits


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_rates_are_those_of_the_modules_now(model_dir: Load, plain: Load, kind: str) -> None:
    """Off, which TRL's `disable_dropout` does, half, and each module at a rate of its own."""
    model, base = peftc.apply("lora", model_dir(kind)), plain(kind)
    base.config.use_cache = False
    first, count = logits(model), len(dropouts(base))
    assert torch.equal(first, logits(base))
    for rates in ([0.0] * count, [0.5] * count, [0.05 * (at % 7) for at in range(count)]):
        for one in (model, base):
            for module, rate in zip(dropouts(one), rates, strict=True):
                module.p = rate
        assert torch.equal(logits(model), logits(base))
        assert not torch.equal(logits(model), first)
    for module in dropouts(model):
        module.p = 0.1
    traced = len(model.surgery.programs)
    assert torch.equal(logits(model), first)
    assert len(model.surgery.programs) == traced == 1, "nothing is traced anew"


def test_a_copy_has_rates_of_its_own(model_dir: Load) -> None:
    import copy

    model = peftc.apply("lora", model_dir("bert"))
    copied, first = copy.deepcopy(model), logits(model)
    for module in dropouts(copied):
        module.p = 0.0
    assert torch.equal(logits(copied), model.eval()(**batch()).logits)
    assert torch.equal(logits(model), first)
