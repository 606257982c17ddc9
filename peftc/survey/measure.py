"""One model type measured: built small, traced, its sites counted, and rules tried on it in float32."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from peftc.diagnostics import PeftcError
from peftc.frontend.trace import InputSpec, Skeleton, build_skeleton, default_inputs
from peftc.ir.program import Program
from peftc.pipeline import analyse
from peftc.store.heads import HEADS, offered, resolve
from peftc.survey import census
from peftc.survey.record import RULES, Record
from peftc.survey.shrink import attempts, default_config
from peftc.survey.trial import Trial
from peftc.survey.weights import read

PREFERRED = (
    "seq2seq-lm", "speech-seq2seq", "masked-lm", "causal-lm", "image-text-to-text", "image-classification", "ctc",
    "audio-classification", "base",
)  # fmt: skip
"""The head that a model type is measured with: the first of these that it has."""

LARGEST = 50_000_000
"""Parameters of a model that is still given weights; a larger one (it could not be made small) is traced only."""

_ANY = (Exception,)
"""A model of a third party with an odd config may raise anything while it is built; the text is the reason told."""


def measure(
    family: str,
    *,
    numbers: bool = True,
    gradients: bool = True,
    onnx: bool = False,
    watch: Callable[[Record], None] | None = None,
) -> Record:
    """Measure one model type. `watch` is shown the record after each step, so that a killed run leaves what it knew.

    `numbers` asks for runs of the rules, with a gradient for each delta unless `gradients` is false, `onnx` for
    onnxruntime as well.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="minutes").removesuffix("+00:00")
    start, record = time.perf_counter(), Record(family, full=numbers and gradients and onnx, measured=now)
    show = watch or (lambda _: None)
    subject = _subject(record, show)
    record.seconds = time.perf_counter() - start
    show(record)
    if subject is not None:
        _count(subject, record)
        show(record)
        if numbers:
            _try_rules(subject, record, gradients=gradients, onnx=onnx, show=show)
    record.seconds = time.perf_counter() - start
    return record


@dataclass(frozen=True, slots=True)
class Subject:
    """A skeleton, the inputs it is called with, and its located trace."""

    skeleton: Skeleton
    inputs: Mapping[str, InputSpec]
    program: Program


def _subject(record: Record, show: Callable[[Record], None]) -> Subject | None:
    """The first small config that builds and traces; otherwise the reason of the first that builds."""
    try:
        raw = default_config(record.family)
    except _ANY as error:
        record.reasons.append(f"no default config: {_first_line(error)}")
        return None
    reason = ""
    for attempt in attempts(raw):
        try:
            skeleton = _skeleton(attempt.config)
            inputs = default_inputs(skeleton.model)
            record.built, record.model, record.inputs = True, type(skeleton.model).__name__, list(inputs)
            show(record)
            program = analyse(skeleton, inputs)
        except _ANY as error:
            attempt.error = error
            reason = _told(error, record) if record.built or not reason else reason
            continue
        record.traced = True
        return Subject(skeleton, inputs, program)
    record.reasons.append(reason)
    return None


def _told(error: Exception, record: Record) -> str:
    if isinstance(error, PeftcError):
        return error.diagnostics[0].message
    where = "crash in trace or locate" if record.built else "does not build"
    return f"{where}: {type(error).__name__}: {_first_line(error)}"


def _skeleton(raw: dict[str, Any]) -> Skeleton:
    """The model with the first head that builds: a config of several towers may not be one of a head for text."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plain = {**raw, "architectures": None}
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(plain)
    offers = offered(config)
    heads = [name for name in PREFERRED if name in offers]
    if not heads:
        raise LookupError(f"none of the heads {', '.join(HEADS)} is offered")
    errors: list[Exception] = []
    for head in heads:
        try:
            cls, config = resolve(plain, f"family `{raw['model_type']}`", head)
            return build_skeleton(cls, config, torch.float32)
        except _ANY as error:
            errors.append(error)
    raise errors[0]


def _count(subject: Subject, record: Record) -> None:
    counted = census.take(subject.skeleton.model, subject.program)
    record.expected = {
        kind: len(getattr(counted, kind)) for kind in ("attention", "linear_attention", "ffn", "experts")
    }
    inside = census.layered(subject.skeleton.model, [site.path for site in subject.program.sites])
    kinds = [s.kind for s in subject.program.sites if s.kind not in ("attention", "ffn") or inside(s.path)]
    record.found = {kind: kinds.count(kind) for kind in ("attention", "ffn", "experts", "block", "linear")}
    for kind in ("attention", "ffn"):
        if not record.right(kind):
            record.reasons.append(f"{kind}: {record.found[kind]} of {record.expected[kind]} found")


def _try_rules(
    subject: Subject, record: Record, *, gradients: bool, onnx: bool, show: Callable[[Record], None]
) -> None:
    used = read(subject.program)
    size = sum(p.numel() for name, p in subject.skeleton.model.named_parameters() if name in used)
    if size > LARGEST:
        record.reasons.append(f"not run: {size:,} parameters when made small")
        return
    try:
        trial = Trial(subject.skeleton, subject.inputs, subject.program)
    except _ANY as error:
        record.reasons.append(f"the traced graph does not run: {type(error).__name__}: {_first_line(error)}")
        return
    if trial.held:
        axes = " and ".join(f"{axis} {size}" for axis, size in sorted(trial.held.items()))
        record.notes.append(f"a trace holds for one length, and others are traced anew; measured at {axes}")
    for rule, hyper in RULES.items():
        if record.found["attention"] == 0 or (rule != "lora" and record.found["ffn"] == 0):
            record.rules[rule] = "no such site"
            continue
        try:
            for step in trial.steps(rule, hyper, gradients=gradients, onnx=onnx and rule == "mam"):
                record.rules[rule] = step
        except PeftcError as error:
            record.reasons.append(f"{rule}: {error.diagnostics[0].message}")
        except _ANY as error:
            record.reasons.append(
                f"{rule} after `{record.rules.get(rule, '')}`: {type(error).__name__}: {_first_line(error)}"
            )
        show(record)


def _first_line(error: BaseException | None) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
