"""`generate` writes the tokens that an argmax over `forward`, written by hand, writes (see tests/generation)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import peftc
from peftc.runtime.generation import preparing
from peftc.runtime.graph_model import GraphModel
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


class GivesNoPositions(LlamaForCausalLM):
    """As EXAONE 4.5: its forward takes positions, its preparation drops them, so columns are counted."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "position_ids": None}


@pytest.mark.parametrize("rule", ["mam", "lora"])
@pytest.mark.parametrize("gives", [True, False], ids=["positions", "none"])
def test_padding_that_shifts_a_prefix_is_told_where_the_class_gives_no_positions(
    rule: str, gives: bool, model_dir: Load
) -> None:
    adapted: Any = moved(peftc.apply(rule, model_dir("llama"))).eval()
    if not gives:
        own = {"forward": type(adapted).forward, **preparing(GivesNoPositions)}
        adapted.__class__ = type("Adapted", (GraphModel, GivesNoPositions), own)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted.generate(**prompts(1), max_new_tokens=2, do_sample=False)
        assert not told
        adapted.generate(**prompts(2), max_new_tokens=2, do_sample=False)
    assert ["counts positions from the first column" in str(one.message) for one in told] == (
        [True] if rule == "mam" and not gives else []
    )
