"""Diagnostics: what peftc says when its user made a mistake.

A diagnostic is a value: a code, a message, the place it is about and one line of help. Code that can go on
after a mistake reports into a `Collector`, so that every error of a file is told at once; `PeftcError` carries
diagnostics up to the command line, which prints them and exits with code 2. Anything else that is raised is a
bug of peftc and keeps its traceback.

    E004 error: unknown tap `ou` of an ffn site
      --> rules/mine.yaml:7:32
       |
     7 |   adapter: {at: ffn, modify: ou, form: bottleneck}
       |                              ^^
       = help: did you mean `out`?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

Severity = Literal["error", "warning", "note"]
"""A warning is likely a mistake; a note is worth knowing of a rule that is right."""

MOST_SHOWN = 50
"""Diagnostics printed of one file; those after it are counted."""

MOST_TOLD = 100
"""Mistakes of one file that are told at all: a file with more is not looked at further."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of one line of a source file; `line`, `col` and `end_col` count from 1, `end_col` is exclusive."""

    file: str
    line: int
    col: int
    end_col: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One error, warning or note about what the user gave."""

    code: str
    message: str
    span: Span | None = None
    help: str | None = None
    severity: Severity = "error"

    def render(self) -> str:
        """The diagnostic as text: headline, place, source line with a caret, help."""
        lines = [f"{self.code} {self.severity}: {self.message}"]
        if self.span is not None:
            lines.extend(_excerpt(self.span))
        if self.help is not None:
            lines.append(f"   = help: {self.help}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dictionary with the keys code, severity, message, file, line, col, end_col, help."""
        span = self.span
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "file": span.file if span else None,
            "line": span.line if span else None,
            "col": span.col if span else None,
            "end_col": span.end_col if span else None,
            "help": self.help,
        }


_WIDEST = 160
"""Columns of a source line that are shown; a longer one is cut around the caret."""


def _excerpt(span: Span) -> list[str]:
    number = str(span.line)
    gutter = " " * (len(number) + 1)
    text, start, width = span.text, span.col - 1, max(1, span.end_col - span.col)
    if len(text) > _WIDEST:
        first = max(0, min(start - _WIDEST // 4, len(text) - _WIDEST))
        text, start = text[first : first + _WIDEST], start - first
        if first > 0:
            text, start = f"...{text}", start + 3
        if first + _WIDEST < len(span.text):
            text, width = f"{text}...", max(1, min(width, len(text) - start))
    pad = "".join("\t" if char == "\t" else " " for char in text[:start].ljust(start))
    return [f"{gutter}--> {span}", f"{gutter} |", f"{number}  | {text}", f"{gutter} | {pad}{'^' * width}"]


class PeftcError(Exception):
    """A user's mistake, told as diagnostics; the command line exits with code 2."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        told = [d.render() for d in self.diagnostics[:MOST_SHOWN]]
        if len(self.diagnostics) > MOST_SHOWN:
            told.append(and_more(len(self.diagnostics) - MOST_SHOWN))
        super().__init__("\n\n".join(told))

    def at(self, span: Span | None) -> PeftcError:
        """The same mistakes, those without a place at `span`."""
        return PeftcError(d if d.span is not None else replace(d, span=span) for d in self.diagnostics)


def and_more(count: int) -> str:
    """What stands for `count` diagnostics that are not printed."""
    return f"... and {count} more"


def fail(code: str, message: str, *, span: Span | None = None, help: str | None = None) -> NoReturn:
    """Raise a `PeftcError` with a single diagnostic."""
    raise PeftcError([Diagnostic(code, message, span, help)])


@dataclass(slots=True)
class Collector:
    """Gathers diagnostics while checking goes on."""

    diagnostics: list[Diagnostic] = field(default_factory=list)

    def error(self, code: str, message: str, *, span: Span | None = None, help: str | None = None) -> None:
        """Tell a mistake. Raises `PeftcError` with all of them at the 100th, for more would only take time."""
        self.diagnostics.append(Diagnostic(code, message, span, help))
        if len(self.diagnostics) >= MOST_TOLD:
            self.raise_if_errors()

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Tell what another part found; see `error`."""
        self.diagnostics.extend(diagnostics)
        if len(self.diagnostics) >= MOST_TOLD:
            self.raise_if_errors()

    def extend_once(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Tell what has not been told yet."""
        self.extend(diagnostic for diagnostic in diagnostics if diagnostic not in self.diagnostics)

    def warn(self, code: str, message: str, *, span: Span | None = None, help: str | None = None) -> None:
        self.diagnostics.append(Diagnostic(code, message, span, help, "warning"))

    def note(self, code: str, message: str, *, span: Span | None = None, help: str | None = None) -> None:
        self.diagnostics.append(Diagnostic(code, message, span, help, "note"))

    @property
    def errors(self) -> list[Diagnostic]:
        return [d for d in self.diagnostics if d.severity == "error"]

    def raise_if_errors(self) -> None:
        """Raise `PeftcError` with every error gathered so far, in source order."""
        if self.errors:
            raise PeftcError(sorted(self.errors, key=place))


def place(diagnostic: Diagnostic) -> tuple[str, int, int]:
    """What diagnostics are sorted by, those of one file together; those without a span come first."""
    return (diagnostic.span.file, diagnostic.span.line, diagnostic.span.col) if diagnostic.span else ("", 0, 0)


_MOST_COMPARED, _MOST_LISTED, _LONGEST_NAME = 128, 40, 64


def _nearness(name: str, other: str) -> tuple[float, bool, bool]:
    """How alike two names are; of equally alike ones a swap of letters is nearer, then the same first letter."""
    ratio = difflib.SequenceMatcher(None, other, name).ratio()
    return ratio, sorted(name) == sorted(other), name[:1] == other[:1]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A help line that names the nearest known name, or lists the known ones when none is near.

    Of very many names those of like length are compared, for comparing is slow and rules come from strangers.
    """
    names = sorted(known)
    near: list[str] = []
    if len(name) <= _LONGEST_NAME:
        alike = [other for other in names if len(other) <= 2 * _LONGEST_NAME]
        if len(alike) > _MOST_COMPARED:
            alike = sorted(alike, key=lambda other: abs(len(other) - len(name)))[:_MOST_COMPARED]
        near = difflib.get_close_matches(name, alike, n=3, cutoff=0.6)
        near.sort(key=lambda other: _nearness(name, other), reverse=True)
    if near:
        return f"did you mean `{near[0]}`?"
    if len(names) > _MOST_LISTED:
        names = [*names[:_MOST_LISTED], "..."]
    return f"known: {', '.join(names)}" if names else None
