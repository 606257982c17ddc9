"""Generation with a cache writes the very tokens of generation without one, for every family and kind of delta.

Everything runs in float64 with deltas far from zero. `make test` runs a sample, the whole table is slow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from generation.conftest import Make, Subject, prompts
from generation.reference import beams, greedy

DECODERS = ("gpt2", "opt", "bloom", "llama", "qwen3", "phi3", "gemma2", "mistral", "gpt_neox")
SEQ2SEQ = ("t5", "bart")
RULES = ("mam", "lora", "prefix", "houlsby")
QUICK = {("llama", "mam"), ("bart", "mam")}
TABLE = [
    pytest.param((family, rule), marks=[] if (family, rule) in QUICK else pytest.mark.slow, id=f"{family}-{rule}")
    for family in (*DECODERS, *SEQ2SEQ)
    for rule in RULES
]
NEW = 9
OPTIONS = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None, "pad_token_id": 1,
}  # fmt: skip
EXACT = 1e-10


@pytest.fixture(scope="module", params=TABLE)
def subject(request: pytest.FixtureRequest, made: Make) -> Subject:
    return made(*request.param)


def given_to(subject: Subject, size: int = 3) -> dict[str, Tensor]:
    """Prompts, padded at the left for a decoder and at the right for an encoder."""
    given = prompts(size)
    return {name: value.flip(1) for name, value in given.items()} if subject.seq2seq else given


def text(subject: Subject, size: int = 3, length: int = 10) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What an encoder is given, a text of `length` tokens, and its mask: padded at the left in a decoder."""
    if not subject.seq2seq:
        given = prompts(size, length)
        return {}, given["input_ids"], given["attention_mask"]
    ids = torch.randint(3, 99, (size, length), generator=torch.Generator().manual_seed(7))
    return given_to(subject, size), ids, torch.ones_like(ids)


def in_pieces(subject: Subject, given: dict[str, Any], ids: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Logits of every token, computed piece by piece with a cache; an encoder is run once."""
    model, cache, found, at = subject.model, None, [], 0
    call = dict(given)
    if subject.seq2seq:
        call = {"attention_mask": given["attention_mask"], "encoder_outputs": model.get_encoder()(**given)}
    for length in lengths:
        call |= {subject.tokens: ids[:, at : at + length], "past_key_values": cache, "use_cache": True}
        if not subject.seq2seq:
            call["attention_mask"] = mask[:, : at + length]
            if subject.takes_positions:
                call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, at : at + length]
        with torch.no_grad():
            result = model(**call)
        cache, at = result.past_key_values, at + length
        found.append(result.logits)
        assert cache.get_seq_length() == at, "the cache holds the caller's tokens, and no prefix"
    return torch.cat(found, 1)


def test_greedy_tokens_are_those_without_a_cache_and_by_hand(subject: Subject) -> None:
    given = given_to(subject)
    found = subject.model.generate(**given, **OPTIONS)
    assert torch.equal(found, greedy(subject, given, NEW))
    assert torch.equal(found, subject.model.generate(**given, **OPTIONS, use_cache=False))


def test_beam_search_gives_the_beams_by_hand(subject: Subject) -> None:
    given = given_to(subject, 2)
    found = subject.model.generate(**given, **OPTIONS, num_beams=3)
    assert torch.equal(found, beams(subject, given, NEW, 3))
    several = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2}
    without = subject.model.generate(**given, **several, use_cache=False)
    assert torch.equal(subject.model.generate(**given, **several), without)


def test_samples_are_those_without_a_cache(subject: Subject) -> None:
    given, options = given_to(subject, 2), {**OPTIONS, "do_sample": True, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(6)
    found = subject.model.generate(**given, **options)
    torch.manual_seed(6)
    assert torch.equal(found, subject.model.generate(**given, **options, use_cache=False))


def test_every_piece_of_a_text_is_the_full_forward(subject: Subject) -> None:
    """Prefill, more tokens on what is there, and single steps; past a sliding window too."""
    given, ids, mask = text(subject, length=16)
    full = subject.logits(given, ids, mask)
    real = mask.bool()
    for lengths in ([5, 1, 1, 4, 1, 3, 1], [1] * 16, [12, 4]):
        found = in_pieces(subject, given, ids, mask, lengths)
        assert (found - full)[real].abs().max() <= EXACT * max(1.0, float(full.abs().max())), lengths


def test_a_padded_row_writes_what_it_writes_alone(subject: Subject) -> None:
    given = given_to(subject)
    together = subject.model.generate(**given, **OPTIONS)[:, -NEW:]
    for row in range(3):
        keep = given["attention_mask"][row].bool()
        alone = {name: value[row : row + 1, keep] for name, value in given.items()}
        assert torch.equal(subject.model.generate(**alone, **OPTIONS)[:, -NEW:], together[row : row + 1])


def test_one_trace_serves_every_length_batch_and_step(subject: Subject) -> None:
    model = subject.model
    model.generate(**given_to(subject), **OPTIONS)
    traces = len(model.surgery.programs)
    for size, count in ((1, 3), (2, 11), (3, 1)):
        given = {name: value[:, 2:] for name, value in given_to(subject, size).items()}
        model.generate(**given, **{**OPTIONS, "max_new_tokens": count})
    model.generate(**given_to(subject, 2), **OPTIONS, num_beams=2)
    assert len(model.surgery.programs) == traces


def test_no_token_sees_a_later_one(subject: Subject) -> None:
    given, ids, mask = text(subject)
    changed = ids.clone()
    changed[:, 8] = (changed[:, 8] + 7) % 90 + 3
    before, after = (in_pieces(subject, given, one, mask, [5, 5]) for one in (ids, changed))
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after)[:, 8].abs().amax(-1) > 1e-4).all()


def test_the_deltas_change_the_text(subject: Subject) -> None:
    """Guards all tests above: each would hold of deltas that do nothing."""
    plain = subject.family.build().double()
    given, ids, mask = text(subject)
    call = {**given, subject.tokens: ids} if subject.seq2seq else {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        difference = subject.model(**call).logits - plain(**call).logits
    assert (difference[mask.bool()].abs().amax(-1) > 1e-2).all()
