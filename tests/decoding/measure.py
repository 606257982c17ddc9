"""One decoder measured: the base built small, its properties, then those of adapted models."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from families.family import softmax_keeps_float64
from torch import Tensor

from decoding.properties import BOUNDS, PROPERTIES, ROUNDED, LacksError, other_texts, padded, text
from decoding.record import HOLDS, Record
from decoding.speaker import Speaker
from decoding.subjects import LARGEST, Traced, built, rules_for, skeleton_of, usual_inputs
from peftc.diagnostics import PeftcError
from peftc.frontend.inputs import InputSpec
from peftc.frontend.trace import Skeleton, quiet
from peftc.ir.copying import copied
from peftc.runtime import graph_model
from peftc.runtime.generation import counts_padding, uncached
from peftc.runtime.signature import call_key
from peftc.survey.shrink import attempts, default_config

OTHERS = 20
"""Texts that a base is asked on again, where an adapted model fails."""

_ANY = (Exception,)
"""A model of a third party with an odd config may raise anything; the text is what is told."""


def measure(family: str, head: str, watch: Callable[[Record], None] = lambda _: None) -> Record:
    """`watch` is shown the record after each step, so that a killed run leaves what it knew."""
    record = Record(family, head)
    with softmax_keeps_float64(), _one_analysis_for_all_rules(), _no_cache_of_fake_results():
        base = _base(record)
        watch(record)
        if base is not None:
            with _timed(record, "base"):
                _judge_base(base, record)
            watch(record)
            traced = _traced(base, record)
            for rule, hyper in rules_for(traced.kinds()).items() if traced is not None else ():
                with _timed(record, rule):
                    _try(traced, base, rule, hyper, record)
                watch(record)
    return record


def _base(record: Record) -> Any:
    """The first small model that builds and runs, in float64 where it does; None with the reason in the record."""
    with _timed(record, "build"):
        try:
            raw = default_config(record.family)
        except _ANY as error:
            record.stopped["build"] = f"no default config: {_first_line(error)}"
            return None
        reasons = []
        for attempt in attempts(raw):
            try:
                return _running(attempt.config, record)
            except _ANY as error:
                attempt.error = error
                reasons.append(_first_line(error))
        record.stopped["build"] = reasons[0]
        return None


@dataclass(frozen=True, slots=True)
class _Base:
    raw: dict[str, Any]
    model: Any
    given: dict[str, Tensor]
    skeleton: Skeleton
    inputs: dict[str, InputSpec]


def _running(raw: dict[str, Any], record: Record) -> _Base:
    for dtype in (torch.float64, torch.float32):
        skeleton = skeleton_of(raw, record.head, dtype)
        size = sum(parameter.numel() for parameter in skeleton.model.parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters when made small")
        inputs = usual_inputs(skeleton)
        record.model, record.dtype = type(skeleton.model).__name__, str(dtype).removeprefix("torch.")
        model = built(raw, record.head, dtype)
        given = _given(inputs, dtype, seq2seq=bool(model.config.is_encoder_decoder))
        try:
            with quiet():
                answer = Speaker.of(model, given).whole(text())
            if not bool(answer.isfinite().all()):
                raise FloatingPointError("it answers no finite number")
        except (RuntimeError, FloatingPointError):
            if dtype is torch.float32:
                raise
            continue
        return _Base(raw, model, given, skeleton, inputs)
    raise AssertionError


def _given(inputs: dict[str, InputSpec], dtype: torch.dtype, *, seq2seq: bool) -> dict[str, Tensor]:
    """What is read beside the text that is written: an encoder's text, sound or image."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Tensor] = {}
    for name, spec in inputs.items():
        if name.startswith("decoder_") or (not seq2seq and name in ("input_ids", "attention_mask")):
            continue
        if name == "input_ids":
            found[name] = text(3)
        elif name == "attention_mask":
            found[name] = torch.ones_like(text(3))
        else:
            sizes = [{"batch": len(text()), "sequence": text().shape[1]}.get(size, size) for size in spec.sizes]
            found[name] = torch.randn(sizes, generator=generator).to(dtype)
    return found


def _judge_base(base: _Base, record: Record) -> None:
    speaker = Speaker.of(base.model, base.given)
    for name, holds in PROPERTIES.items():
        try:
            with quiet():
                difference = holds(speaker)
        except LacksError as lack:
            record.base[name] = f"lacks: {lack}"
        except _ANY as error:
            record.base[name] = f"lacks: {type(error).__name__}: {_first_line(error)}"
        else:
            kinds = ("exact", "float32") if record.dtype == "float64" else ("float32",)
            verdict = next((kind for kind in kinds if difference <= BOUNDS[kind]), None)
            record.base[name] = verdict or f"lacks: differs by {difference:.1e}"


def _traced(base: _Base, record: Record) -> Traced | None:
    """The base with the trace of what `generate` calls it with, which serves most of what is asked."""
    with _timed(record, "trace"):
        inputs = dict(base.inputs)
        if Speaker.of(base.model, base.given).positions:
            inputs["position_ids"] = InputSpec(torch.long, ("batch", "sequence"))
        try:
            with quiet():
                program = graph_model.analyse(base.skeleton, inputs)
        except _ANY as error:
            record.stopped["trace"] = _told(error)
            return None
        return Traced(base.model, base.skeleton, inputs, program)


def _try(traced: Traced, base: _Base, rule: str, hyper: dict[str, object], record: Record) -> None:
    try:
        with quiet():
            model = traced.adapted(rule, hyper)
            speaker = Speaker.of(model, base.given)
            _changes(speaker, Speaker.of(base.model, base.given))
            reason = uncached(model) if record.base["cached"] in HOLDS else None
    except _ANY as error:
        record.stopped[rule] = _told(error)
        return
    verdicts = record.rules.setdefault(rule, {})
    for name, holds in PROPERTIES.items():
        if record.base[name] not in HOLDS:
            continue
        if name == "cached" and reason is not None:
            verdicts[name] = f"uncached: {reason}"
            continue
        verdict = _verdict(holds, speaker, record.base[name], rounds=traced.rounds())
        if verdict.startswith("fails"):
            verdict = _explained(name, verdict, model, base, record)
        if verdict:
            verdicts[name] = verdict


def _explained(name: str, verdict: str, model: Any, base: _Base, record: Record) -> str:
    """A failure, what peftc says of it, or nothing where the base fails too, on another text.

    A selection (of experts, of keys) may hold ties: then a base is right on some texts by luck.
    """
    stated = _stated(name, model, base)
    if stated is not None:
        return f"stated: {stated}"
    speaker, bound = Speaker.of(base.model, base.given), BOUNDS[record.base[name]]
    for number in range(1, OTHERS + 1):
        try:
            with quiet(), other_texts(number):
                difference = PROPERTIES[name](speaker)
        except LacksError as lack:
            record.base[name] = f"lacks: on other texts: {lack}"
        else:
            if difference <= bound:
                continue
            record.base[name] = f"lacks: on other texts: differs by {difference:.1e}"
        for verdicts in record.rules.values():
            verdicts.pop(name, None)
        return ""
    return verdict


def _stated(name: str, model: Any, base: _Base) -> str | None:
    """What peftc says of rows padded at the left: of its forward without positions, or in a warning of `generate`."""
    speaker = Speaker.of(model, base.given)
    if name == "left":
        return None if speaker.positions else counts_padding(model)
    if name != "greedy" or speaker.seq2seq:
        return None
    with warnings.catch_warnings(record=True) as told, contextlib.suppress(*_ANY):  # whose verdict stands
        warnings.simplefilter("always")
        speaker.written(*padded(text(), side="left"))
    return next((str(one.message) for one in told if str(one.message) == counts_padding(model)), None)


def _verdict(holds: Callable[[Speaker], float], speaker: Speaker, wanted: str, *, rounds: bool) -> str:
    try:
        with quiet():
            difference = holds(speaker)
    except LacksError as lack:
        return f"fails: {lack}"
    except _ANY as error:
        return f"fails: {_told(error)}"
    if difference <= BOUNDS[wanted]:
        return wanted
    return "float32" if rounds and difference <= ROUNDED else f"fails: differs by {difference:.1e}"


def _changes(adapted: Speaker, base: Speaker) -> None:
    """Guards all that follows: each property would hold of deltas that do nothing."""
    one, other = adapted.whole(text()), base.whole(text())
    if not float((one - other).abs().max()) > 1e-3 * float(other.abs().max()):
        raise LacksError("the deltas change nothing")


@contextlib.contextmanager
def _one_analysis_for_all_rules() -> Iterator[None]:
    """A trace is found once and copied for each rule: models that are made here share their skeletons."""
    original, kept = graph_model.analyse, {}

    def shared(skeleton: Any, inputs: Any, flags: Any = None, layout: Any = None) -> Any:
        key = (id(skeleton), call_key(inputs, flags or {}), layout)
        if key not in kept:
            try:
                kept[key] = original(skeleton, inputs, flags, layout)
            except _ANY as error:
                kept[key] = error
        if isinstance(kept[key], Exception):
            raise kept[key]
        return copied(kept[key])

    graph_model.analyse = shared
    try:
        yield
    finally:
        graph_model.analyse = original


@contextlib.contextmanager
def _no_cache_of_fake_results() -> Iterator[None]:
    """torch keeps what ops answer for symbolic shapes, and hardly meets one again: a third of a trace's time."""
    from torch._dynamo import config

    before: Any = config.fake_tensor_cache_enabled
    config.fake_tensor_cache_enabled = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        config.fake_tensor_cache_enabled = before


@contextlib.contextmanager
def _timed(record: Record, what: str) -> Iterator[None]:
    start = time.process_time()
    try:
        yield
    finally:
        record.seconds[what] = round(time.process_time() - start, 2)


def _told(error: BaseException) -> str:
    if isinstance(error, PeftcError):
        return f"{error.diagnostics[0].code} {error.diagnostics[0].message}"
    return str(error) if isinstance(error, LacksError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
