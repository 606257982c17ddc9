"""Where a cache would be wrong there is none: `generate` says why, and computes every token from the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generation.conftest import Make, prompts
from generation.reference import greedy
from peftc.diagnostics import PeftcError

NEW = 5
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def test_a_prompt_generates_without_a_cache_and_says_why(made: Make) -> None:
    subject, given = made("llama", "prompt"), prompts(2)
    with pytest.warns(UserWarning, match=r"without a cache: .*delta `prompt` makes the sequence longer"):
        found = subject.model.generate(**given, **OPTIONS)
    assert torch.equal(found, greedy(subject, given, NEW))
    with pytest.raises(PeftcError, match=r"E041 error: `use_cache`: .*delta `prompt` makes the sequence longer"):
        subject.model.generate(**given, **OPTIONS, use_cache=True)
    with pytest.raises(PeftcError, match=r"E041 error: .*delta `prompt` makes the sequence longer"):
        subject.model(**given, use_cache=True)
