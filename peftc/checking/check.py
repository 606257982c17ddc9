"""Check: every error, warning and note of rule and form files at once, without a model or against one.

    report = check(["mine.yaml"], model="path/to/model")
    report.errors, report.summary

Without a model no torch is imported. With one, each rule is planned and inserted into the model's graph, nothing is
written, and notes say what will not fold and what changes the outputs before any training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.diagnostics import Collector, Diagnostic, PeftcError, Span, place

if TYPE_CHECKING:
    from peftc.fold.decide import Decision
    from peftc.ir.program import Insertion, Program
    from peftc.lang.rule import Delta, Rule
    from peftc.planning.plan import Plan

Insert = Callable[["Rule"], tuple["Program", "Plan"]]
"""Plans a rule on a freshly traced model and inserts it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One file with what is to be said of it, in source order."""

    file: str
    diagnostics: tuple[Diagnostic, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was found in all the files."""

    files: tuple[Checked, ...]

    def count(self, severity: str) -> int:
        return sum(d.severity == severity for file in self.files for d in file.diagnostics)

    @property
    def errors(self) -> int:
        return self.count("error")

    @property
    def summary(self) -> str:
        """One line, such as `3 rules, 1 error, 2 warnings`."""
        counts = [_counted(len(self.files), "rule"), _counted(self.errors, "error")]
        counts.append(_counted(self.count("warning"), "warning"))
        if self.count("note"):
            counts.append(_counted(self.count("note"), "note"))
        return ", ".join(counts)


def check(
    rules: Sequence[str],
    sets: Mapping[str, object] | None = None,
    *,
    model: str | Path | None = None,
    head: str | None = None,
    num_labels: int | None = None,
) -> CheckReport:
    """Check rules (files or names of the library) and form files. Raises `PeftcError` for a wrong `model` only."""
    insert = None if model is None else _inserter(Path(model), head, num_labels)
    return CheckReport(tuple(_check_file(name, sets or {}, insert) for name in rules))


def _check_file(name: str, sets: Mapping[str, object], insert: Insert | None) -> Checked:
    from peftc.checking.check_tests import check_tests
    from peftc.lang.forms import is_form, parse_form
    from peftc.lang.idle import check_trains
    from peftc.lang.lint import lint
    from peftc.lang.loader import parse_rule, rule_source
    from peftc.lang.shapes.check import check_row
    from peftc.patterns.reading import is_pattern, parse_pattern

    try:
        text, file = rule_source(name)
    except PeftcError as error:
        return Checked(name, error.diagnostics)
    found: list[Diagnostic] = []
    try:
        if is_form(text):
            parse_form(text, file)
        elif is_pattern(text):
            parse_pattern(text, file)
        else:
            rule = parse_rule(text, file, sets)
            told = (diagnostic for delta in rule.deltas for diagnostic in check_row(delta, rule.hyper))
            found += (diagnostic for diagnostic in told if diagnostic.severity == "warning")
            found += check_trains(rule)
            found += check_tests(rule)
            found += [] if insert is None else _against_model(rule, insert)
    except PeftcError as error:
        found += error.diagnostics
    found += _not_explained(lint(text, file), found)
    return Checked(file, tuple(sorted(found, key=place)))


def _not_explained(warnings: list[Diagnostic], errors: list[Diagnostic]) -> list[Diagnostic]:
    """The warnings that no error explains: `bais`, told as meant for `bias`, is why nothing reads `bias`."""
    meant = {name for error in errors for name in re.findall(r"^did you mean `(.*)`\?$", error.help or "")}
    places = {place(error) for error in errors}
    return [w for w in warnings if place(w) not in places and not meant & set(re.findall(r"`([^`]*)`$", w.message))]


def _inserter(path: Path, head: str | None, num_labels: int | None) -> Insert:
    from peftc.frontend.trace import build_skeleton, default_inputs
    from peftc.pipeline import analyse, rewrite
    from peftc.runtime.api import new_parameters
    from peftc.store.heads import resolve
    from peftc.store.model_dir import ModelDir

    base = ModelDir.open(path)
    base.refuse_adapted()
    cls, config = resolve(base.config, base.path, head, num_labels)

    def insert(rule: Rule) -> tuple[Program, Plan]:
        skeleton = build_skeleton(cls, config)  # a rewrite changes the program, so each rule gets its own
        program = analyse(skeleton, default_inputs(skeleton.model))
        return program, rewrite(program, rule, fresh=new_parameters(base, skeleton))

    return insert


def _against_model(rule: Rule, insert: Insert) -> list[Diagnostic]:
    from peftc.lang.idle import check_trains, idle
    from peftc.passes.fold import analyse_folds

    try:
        program, plan = insert(rule)
    except PeftcError as error:
        return [_placed(diagnostic, rule) for diagnostic in error.diagnostics]
    collector = Collector()
    if not plan.trainable and not check_trains(rule):
        collector.extend([idle(rule, "no parameter of its rows is there in this model")])
    _note_folds(rule, analyse_folds(program), collector)
    _note_starts(rule, program, collector)
    return collector.diagnostics


def _placed(diagnostic: Diagnostic, rule: Rule) -> Diagnostic:
    """A diagnostic about a delta, without a place, at the delta's row."""
    named = re.match(r"delta `([^`.]+)", diagnostic.message)
    if diagnostic.span is not None or named is None:
        return diagnostic
    span = next((delta.span for delta in rule.deltas if delta.name == named[1]), None)
    return Diagnostic(diagnostic.code, diagnostic.message, span, diagnostic.help, diagnostic.severity)


def _note_folds(rule: Rule, decisions: list[Decision], collector: Collector) -> None:
    """W011 for each delta that does not become part of the base's weights, once for each reason."""
    for delta in rule.deltas:
        own = [d for d in decisions if not d.folds and _row(d.insertion.delta) == delta.name]
        groups: dict[tuple[str, str], list[Decision]] = {}
        for decision in own:  # nodes of different layers have different numbers
            groups.setdefault((decision.result, re.sub(r"_\d+\b", "", decision.reason)), []).append(decision)
        for (result, _), group in groups.items():
            help = "ONNX holds it as nodes" if result == "kept" else "ONNX holds it as constants"
            count, (text, span) = (
                _counted(len({id(d.insertion.site) for d in group}), "site"),
                _hinders(group[0], delta),
            )
            message = f"delta `{delta.name}` does not fold into weights ({count}): {group[0].reason}{text}"
            collector.note("W011", message, span=span, help=f"a plain checkpoint cannot hold it; {help}")


def _hinders(decision: Decision, delta: Delta) -> tuple[str, Span | None]:
    """What keeps a delta in the graph: its text where it is in a form of another file, and its place or the row's."""
    from peftc.lang.lower import PLACE

    node = next((node for node in decision.insertion.nodes if node.name == decision.node), None)
    text, span = node.meta.get(PLACE, ("", None)) if node is not None and decision.result == "kept" else ("", None)
    if span is None or node is decision.insertion.after:
        return "", delta.span
    if delta.span is not None and span.file == delta.span.file:
        return "", span
    return f", in `{text}` of form `{delta.form.name}`", delta.span_at("form")


def _note_starts(rule: Rule, program: Program, collector: Collector) -> None:
    """W012 for each delta that is not shown to leave the outputs as they are at the start."""
    from peftc.ir.zero import starts_as_identity

    moving = [entry for entry in program.ledger if not starts_as_identity(program, entry)]
    for delta, count in _by_row(rule, moving):
        message = f"delta `{delta.name}` is not zero at its initial values ({_counted(count, 'site')})"
        help = "the model starts with other outputs than the base; `init: zeros` of a last factor prevents it"
        collector.note("W012", message, span=delta.span, help=help)


def _by_row(rule: Rule, entries: list[Insertion]) -> Iterator[tuple[Delta, int]]:
    """The rows that have entries, each with the number of their sites."""
    for delta in rule.deltas:
        count = len({id(entry.site) for entry in entries if _row(entry.delta) == delta.name})
        if count:
            yield delta, count


def _row(label: str) -> str:
    """The row's name in a ledger entry's: `lora` of `lora.q`."""
    return label.partition(".")[0]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
