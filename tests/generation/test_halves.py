"""An encoder-decoder's graph, cut: encoder, decoder and step are parts of one rewritten graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generation.conftest import Make, Subject
from generation.test_matrix import EXACT, OPTIONS, given_to, text
from peftc.ir.program import module_path

BOTH = ["bart", pytest.param("t5", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=BOTH)
def subject(request: pytest.FixtureRequest, made: Make) -> Subject:
    return made(request.param, "mam")


def whole(subject: Subject, **more: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    given, ids, _ = text(subject)
    call = {**given, "decoder_input_ids": ids}
    with torch.no_grad():
        return given, call, subject.model(**call, **more)


def test_the_encoder_says_what_it_says_in_the_whole(subject: Subject) -> None:
    given, _, result = whole(subject, output_hidden_states=True)
    encoder = subject.model.get_encoder()
    with torch.no_grad():
        alone, plain = (
            encoder(**given, output_hidden_states=True),
            subject.family.build().double().get_encoder()(**given),
        )
    assert (alone.last_hidden_state - result.encoder_last_hidden_state).abs().max() <= EXACT
    assert len(alone.hidden_states) == len(result.encoder_hidden_states)
    for one, other in zip(alone.hidden_states, result.encoder_hidden_states, strict=True):
        assert (one - other).abs().max() <= EXACT
    assert (alone.last_hidden_state - plain.last_hidden_state).abs().max() > 1e-2, "its deltas are in it"
    assert encoder.config is subject.model.base_model.get_encoder().config


@pytest.mark.parametrize("kind", ["an output", "a tuple"])
def test_the_decoder_takes_what_the_encoder_said(subject: Subject, kind: str) -> None:
    given, call, result = whole(subject)
    with torch.no_grad():
        encoded = subject.model.get_encoder()(**given)
        if kind == "a tuple":
            encoded = encoded.to_tuple()
        call = {"encoder_outputs": encoded, "attention_mask": call["attention_mask"]} | {
            "decoder_input_ids": call["decoder_input_ids"]
        }
        found = subject.model(**call)
    assert (found.logits - result.logits).abs().max() <= EXACT
    assert (found.encoder_last_hidden_state - encoded[0]).abs().max() == 0


def test_a_step_computes_no_encoder_and_no_keys_of_it(subject: Subject) -> None:
    subject.model.generate(**given_to(subject), **OPTIONS)
    steps = [part for part in subject.model.surgery.cuts.values() if "crossed_0_keys" in part.inputs]
    assert steps
    for step in steps:
        computed = {module_path(node) for node in step.graph.nodes if node.op == "call_function"}
        cross = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v")
        assert not [path for path in computed if path.endswith(cross)]
        assert not [path for path in computed if path.startswith(("model.encoder.", "encoder."))]


def test_outputs_of_the_encoder_are_passed_on(subject: Subject) -> None:
    given, call, _ = whole(subject)
    with torch.no_grad():
        encoded = subject.model.get_encoder()(**given, output_hidden_states=True)
        result = subject.model(
            encoder_outputs=encoded,
            attention_mask=call["attention_mask"],
            decoder_input_ids=call["decoder_input_ids"],
            output_hidden_states=True,
        )
    assert result.encoder_hidden_states is encoded.hidden_states
    assert len(result.decoder_hidden_states) == 3
