"""The decoder table: its properties tell right models from broken ones, its rows say why, a sample is measured anew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from families.family import softmax_keeps_float64

from decoding.properties import BOUNDS, PROPERTIES, LacksError, other_texts, text
from decoding.record import HOLDS, Record, totals
from decoding.record import PROPERTIES as NAMES
from decoding.speaker import Speaker
from decoding.subjects import built, every_decoder, skeleton_of, usual_inputs
from decoding.sweep import sweep
from decoding.table import read
from peftc.frontend.inputs import InputSpec
from peftc.ir.positions import prefix_counted_from_the_first_column
from peftc.lang.loader import load_rule
from peftc.pipeline import analyse, rewrite
from peftc.survey.shrink import attempts, default_config


def small(family: str, head: str = "causal-lm", **changes: Any) -> Any:
    raw = next(attempts(default_config(family))).config
    return built({**raw, **changes}, head, torch.float64)


@pytest.fixture(scope="module")
def gpt2() -> Iterator[Speaker]:
    with softmax_keeps_float64():
        yield Speaker.of(small("gpt2"), {})


@pytest.mark.parametrize("name", NAMES)
def test_gpt2_has_every_property(gpt2: Speaker, name: str) -> None:
    assert PROPERTIES[name](gpt2) <= BOUNDS["exact"]


def broken(model: Any, change: Any) -> Speaker:
    """The model with `change` done to the arguments of every call."""
    original = model.forward
    cls = type(model)
    wrong = type(cls.__name__, (cls,), {"forward": cls.forward})
    model.__class__ = wrong
    model.forward = lambda **kwargs: original(**change(kwargs))
    return Speaker.of(model, {})


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda call: {**call, "past_key_values": None}, {"cached", "greedy"}),
        (lambda call: {**call, "position_ids": None}, {"left"}),
        (lambda call: {**call, "input_ids": call["input_ids"].flip(1)}, {"causal", "cached", "left", "right"}),
    ],
    ids=["forgets its cache", "forgets its positions", "reads backwards"],
)
def test_a_property_tells_a_broken_model(change: Any, lost: set[str]) -> None:
    speaker = broken(small("gpt2"), change)
    for name in lost:
        try:
            difference = PROPERTIES[name](speaker)
        except LacksError:
            continue
        assert difference > 1e-3, name


def test_an_encoder_is_told_by_causality() -> None:
    model = small("bert")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.config.is_decoder = False
    assert PROPERTIES["causal"](Speaker.of(model, {})) > 1e-3
    assert text().shape[0] == 3


def test_every_row_of_the_table_is_a_decoder_with_an_answer_or_a_reason() -> None:
    rows, known = read(), {":".join(one) for one in every_decoder()}
    assert rows and set(rows) <= known
    for name, row in rows.items():
        assert row.stopped or row.rules, name
        for rule, verdicts in row.rules.items():
            wanted = {what for what, verdict in row.base.items() if verdict in HOLDS}
            assert set(verdicts) == wanted or row.stopped, (name, rule)


def test_a_verdict_beyond_the_bound_is_a_failure_of_the_row_and_of_the_totals() -> None:
    row = Record("any", "causal-lm", base={"cached": "exact"}, rules={"lora": {"cached": "fails: differs by 1.0"}})
    assert row.failures == ["lora cached: fails: differs by 1.0"]
    assert totals([row])["cached"]["fails"] == 1 and totals([row])["subjects"]["with a failure"] == 1


def test_a_rule_that_is_refused_is_no_failure_and_is_counted() -> None:
    row = Record("any", "causal-lm", stopped={"mam": "E004 no heads", "lora": "E024 no gradient"})
    assert row.failures == ["lora: E024 no gradient"]
    assert totals([row])["subjects"]["rules refused"] == 1


def test_other_texts_are_other_ones_for_as_long_as_asked() -> None:
    before = text()
    with other_texts(1):
        assert not torch.equal(text(), before)
    assert torch.equal(text(), before)


@pytest.mark.parametrize("positions", [False, True], ids=["columns", "positions"])
def test_a_prefix_is_seen_from_places_that_padding_shifts_where_columns_are_counted(positions: bool) -> None:
    skeleton = skeleton_of(next(attempts(default_config("llama"))).config, "causal-lm", torch.float32)
    inputs = usual_inputs(skeleton)
    if positions:
        inputs["position_ids"] = InputSpec(torch.long, ("batch", "sequence"))
    program = analyse(skeleton, inputs)
    assert prefix_counted_from_the_first_column(program) is None
    rewrite(program, load_rule("prefix", {"l": 3}))
    assert prefix_counted_from_the_first_column(program) == (None if positions else "prefix")


@pytest.mark.slow
def test_generate_warns_of_rows_padded_at_the_left_where_a_prefix_is_seen_from_columns() -> None:
    row = next(sweep([("moss_transcribe_diarize", "causal-lm")], seconds=300))
    assert row.rules["mam"]["left"].startswith("stated: MossTranscribeDiarize") and not row.failures


@pytest.mark.slow
def test_a_decoder_that_takes_too_long_ends_alone() -> None:
    assert "not done after 0 s" in next(sweep([("gpt2", "causal-lm")], seconds=0)).stopped["time"]


@pytest.mark.slow
def test_a_sample_measured_anew_fails_nowhere_that_the_table_does_not() -> None:
    """Grouped and mixed experts, scans, images, an encoder-decoder, and ten that differ with the version."""
    rows = read()
    right = sorted(name for name, row in rows.items() if row.rules and not row.failures)
    named = ["llama:causal-lm", "qwen3_moe:causal-lm", "mamba:causal-lm", "gemma3:causal-lm", "t5:seq2seq-lm"]
    sample = dict.fromkeys([*named, *random.Random(transformers.__version__).sample(right, min(10, len(right)))])
    subjects = [(family, head) for family, _, head in (name.partition(":") for name in sample)]
    for row in sweep(subjects, seconds=300):
        assert row.rules and not row.failures, (row.name, row.failures, row.stopped)
