"""The cache objects of transformers, between calls and under its other ways to generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from generation.conftest import Make, Subject, prompts
from generation.test_matrix import EXACT, OPTIONS, given_to, in_pieces, text
from peftc.diagnostics import PeftcError

QUICK = ("llama",)
SLOW = ("gemma2", "mistral", "gpt2", "t5", "bart")


@pytest.fixture(
    scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)  # fmt: skip
def subject(request: pytest.FixtureRequest, made: Make) -> Subject:
    return made(request.param, "mam")


@pytest.fixture(scope="module")
def uncached(subject: Subject) -> Tensor:
    return subject.model.generate(**given_to(subject), **OPTIONS, use_cache=False)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_writes_the_same(subject: Subject, beams: int) -> None:
    given, options = given_to(subject), {**OPTIONS, "num_beams": beams}
    found = subject.model.generate(**given, **options, cache_implementation="static")
    assert torch.equal(found, subject.model.generate(**given, **options, use_cache=False))


def test_a_long_prompt_read_in_chunks_writes_the_same(subject: Subject, uncached: Tensor) -> None:
    if subject.seq2seq:
        pytest.skip("transformers cuts the encoder's mask with the decoder's tokens here")
    assert torch.equal(subject.model.generate(**given_to(subject), **OPTIONS, prefill_chunk_size=3), uncached)


def test_a_streamer_gets_every_token(subject: Subject) -> None:
    got: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            got.append(value.flatten())

        def end(self) -> None: ...

    given = given_to(subject, 1)
    found = subject.model.generate(**given, **OPTIONS, streamer=Streamer())
    assert torch.equal(torch.cat(got), found[0])


def assistant(subject: Subject) -> Any:
    return subject.family.build().double()


@pytest.mark.parametrize("how", ["a model", "the text"])
def test_assisted_decoding_writes_the_same(subject: Subject, how: str) -> None:
    given = given_to(subject, 1)
    helper = (
        {"assistant_model": subject.family.build().double()} if how == "a model" else {"prompt_lookup_num_tokens": 3}
    )
    found = subject.model.generate(**given, **OPTIONS, **helper)
    assert torch.equal(found, subject.model.generate(**given, **OPTIONS, use_cache=False))


def continued(subject: Subject, given: dict[str, Any], ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Logits of the last tokens of a text, whose first ones the cache holds."""
    first = cache.get_seq_length()
    call: dict[str, Any] = {subject.tokens: ids[:, first:], "past_key_values": cache}
    if subject.seq2seq:
        call |= {"attention_mask": given["attention_mask"], "encoder_outputs": subject.model.get_encoder()(**given)}
    else:
        call["attention_mask"] = mask
        if subject.takes_positions:
            call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:]
    with torch.no_grad():
        return subject.model(**call).logits


def filled(subject: Subject, given: dict[str, Any], ids: Tensor, mask: Tensor) -> Any:
    """The cache of a text."""
    call: dict[str, Any] = {**given, subject.tokens: ids, "use_cache": True}
    if not subject.seq2seq:
        call["attention_mask"] = mask
        if subject.takes_positions:
            call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return subject.model(**call).past_key_values


def test_a_cache_may_be_cut_reordered_and_copied_between_calls(subject: Subject) -> None:
    given, ids, mask = text(subject)
    full, real = subject.logits(given, ids, mask), mask.bool()
    cache = filled(subject, given, ids[:, :5], mask[:, :5])
    order = torch.tensor([2, 0, 1])
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(order)
    there = {name: value[order] for name, value in given.items()}
    found = continued(subject, there, ids[order], mask[order], reordered)
    assert (found - full[order, 5:])[real[order, 5:]].abs().max() <= EXACT
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    found = continued(subject, given, ids, mask, cache)
    assert (found - full[:, 3:])[real[:, 3:]].abs().max() <= EXACT


def test_a_cache_is_given_back_as_the_object_it_is(subject: Subject) -> None:
    from transformers import DynamicCache

    given, ids, mask = text(subject)
    made = filled(subject, given, ids[:, :4], mask[:, :4])
    assert type(made).__name__ == ("EncoderDecoderCache" if subject.seq2seq else "DynamicCache")
    if not subject.seq2seq:
        own = DynamicCache(config=subject.model.config)
        with torch.no_grad():
            result = subject.model(input_ids=ids, attention_mask=mask, past_key_values=own)
        assert result.past_key_values is own
        plain = subject.family.build().double()
        with torch.no_grad():
            theirs = plain(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        shapes = [[tuple(layer.keys.shape) for layer in cache.layers] for cache in (own, theirs)]
        assert shapes[0] == shapes[1], "a sliding window keeps what it keeps in the base"


def test_a_mask_that_does_not_cover_the_past_is_an_error(subject: Subject) -> None:
    given, ids, mask = text(subject)
    cache = filled(subject, given, ids[:, :4], mask[:, :4])
    name = "decoder_attention_mask" if subject.seq2seq else "attention_mask"
    call = {**given, subject.tokens: ids[:, 4:6], name: mask[:, 4:6], "past_key_values": cache}
    with pytest.raises(
        PeftcError, match=rf"E041 error: `{name}` is 2 long, but the cache holds 4 tokens and 2 are new"
    ):
        subject.model(**call)


def test_an_offloaded_cache_is_refused_by_name(subject: Subject) -> None:
    with pytest.raises(PeftcError, match=r"E041 error: an adapted model reads no offloaded cache"):
        subject.model.generate(**given_to(subject), **OPTIONS, cache_implementation="offloaded")


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "opt", "bart"))])
def test_the_spelled_out_attention_equals_the_fused_one_with_a_cache(made: Make, name: str) -> None:
    fused, eager = made(name, "mam"), made(name, "mam", "eager")
    given, ids, mask = text(fused)
    found = [in_pieces(one, given, ids, mask, [5, 1, 4]) for one in (fused, eager)]
    regions = {type(site.region).__name__ for site in last_program(eager).sites if site.kind == "attention"}
    assert regions == {"EagerRegion"}
    assert (found[0] - found[1])[mask.bool()].abs().max() <= EXACT


def last_program(subject: Subject) -> Any:
    return list(subject.model.surgery.programs.values())[-1]


def test_a_static_cache_that_is_full_is_an_error(made: Make) -> None:
    from transformers import StaticCache

    subject, given = made("llama", "mam"), prompts(1)
    cache = StaticCache(config=subject.model.config, max_cache_len=4)
    with pytest.raises(PeftcError, match=r"E041 error: .*7 more tokens into a static cache of 4 that holds 0"):
        subject.model(**given, past_key_values=cache)


def test_a_mixture_of_experts_has_a_cache() -> None:
    """Its experts run as one grouped product, which the device without memory computes for bfloat16 alone."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from peftc.frontend.cache import cache_layout
    from peftc.frontend.trace import build_skeleton, default_inputs

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    skeleton = build_skeleton(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, **more), torch.float32)
    before = skeleton.config._experts_implementation
    layout = cache_layout(skeleton, default_inputs(skeleton.model))
    assert [layer.heads for layer in layout.layers if layer is not None] == [2, 2]
    assert skeleton.config._experts_implementation == before


def test_a_decoder_that_attends_to_no_encoder_has_a_plain_cache() -> None:
    """It answers with a cache for cross attention too, which stays empty."""
    from transformers import MegatronBertConfig, MegatronBertForCausalLM

    from peftc.frontend.cache import cache_layout
    from peftc.frontend.trace import build_skeleton, default_inputs

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    skeleton = build_skeleton(MegatronBertForCausalLM, MegatronBertConfig(**sizes, is_decoder=True))
    layout = cache_layout(skeleton, default_inputs(skeleton.model))
    assert not layout.cross and len(layout.layers) == 1
