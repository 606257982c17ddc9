"""`generate` writes the tokens that an argmax over `forward`, written by hand, writes (see tests/generation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from runtime.tiny import moved

Load = Callable[..., Any]
NEW, PAD, END = 8, 0, 2


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, model_dir: Load) -> Any:
    return moved(peftc.apply("mam", model_dir(request.param), set={"l": 3, "r": 4})).eval()


def prompts(size: int) -> dict[str, Tensor]:
    """`size` prompts, padded at the left as generation wants them."""
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(6) >= 2 * torch.arange(size)[:, None]).long()
    ids = torch.randint(3, 99, (size, 6), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def by_hand(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    for _ in range(NEW):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits
        token = torch.where(ended, PAD, logits[:, -1].argmax(-1))
        ended |= token == END
        input_ids = torch.cat([input_ids, token[:, None]], 1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)[:, None]], 1)
        if ended.all():
            break
    return input_ids


@pytest.mark.parametrize("size", [1, 3])
def test_greedy_tokens_are_those_of_an_argmax_by_hand(model: Any, size: int) -> None:
    given = prompts(size)
    assert torch.equal(model.generate(**given, max_new_tokens=NEW, do_sample=False), by_hand(model, **given))


def test_prompt_without_a_mask_is_read_whole(model: Any) -> None:
    ids = prompts(1)["input_ids"]
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, by_hand(model, ids, torch.ones_like(ids)))


def test_beams_and_samples_are_as_many_as_asked_for(model: Any) -> None:
    found = model.generate(**prompts(2), max_new_tokens=4, num_beams=2, num_return_sequences=2, do_sample=False)
    assert found.shape[0] == 4
    assert model.generate(**prompts(2), max_new_tokens=4, do_sample=True).shape[0] == 2
