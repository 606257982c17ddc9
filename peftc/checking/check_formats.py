"""How a check report is written: for people, as JSON, as annotations of GitHub Actions, or as SARIF 2.1.0.

$ peftc check mine.yaml --format sarif > peftc.sarif
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import peftc
from peftc.checking.check import Checked, CheckReport
from peftc.diagnostics import MOST_SHOWN, Diagnostic, and_more
from peftc.reference.explain import ENTRIES

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def as_json(report: CheckReport) -> str:
    """One object with `files` (each with its diagnostics) and the counts."""
    files = [{"file": file.file, "diagnostics": [d.to_json() for d in file.diagnostics]} for file in report.files]
    counts = {f"{severity}s": report.count(severity) for severity in _COMMANDS}
    return json.dumps({**counts, "files": files}, indent=2, ensure_ascii=False)


def as_github(report: CheckReport) -> str:
    """A workflow command a diagnostic, such as `::error file=mine.yaml,line=3,col=9,endColumn=11,title=E012::...`."""
    lines: list[str] = []
    for file in report.files:
        lines += [_workflow_command(file, diagnostic) for diagnostic in file.diagnostics[:MOST_SHOWN]]
        if len(file.diagnostics) > MOST_SHOWN:
            lines.append(f"::notice file={_property(file.file)}::{and_more(len(file.diagnostics) - MOST_SHOWN)}")
    return "\n".join(lines)


def _workflow_command(file: Checked, diagnostic: Diagnostic) -> str:
    span = diagnostic.span
    where = {"file": span.file if span else file.file}
    if span is not None:
        where |= {"line": str(span.line), "col": str(span.col), "endColumn": str(span.end_col)}
    where["title"] = diagnostic.code
    properties = ",".join(f"{key}={_property(value)}" for key, value in where.items())
    return f"::{_COMMANDS[diagnostic.severity]} {properties}::{_data(_message(diagnostic))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _message(diagnostic: Diagnostic) -> str:
    return diagnostic.message if diagnostic.help is None else f"{diagnostic.message}\n{diagnostic.help}"


def as_sarif(report: CheckReport) -> str:
    """A SARIF 2.1.0 log of one run; its rules are the codes that occur, each with its long form."""
    codes = sorted({d.code for file in report.files for d in file.diagnostics})
    driver = {"name": "peftc", "version": peftc.__version__, "rules": [_sarif_rule(code) for code in codes]}
    results = [_sarif_result(file, d, codes) for file in report.files for d in file.diagnostics]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False)


def _sarif_rule(code: str) -> dict[str, Any]:
    entry = ENTRIES[code]
    return {"id": code, "shortDescription": {"text": entry.title}, "fullDescription": {"text": entry.text}}


def _sarif_result(file: Checked, diagnostic: Diagnostic, codes: list[str]) -> dict[str, Any]:
    span = diagnostic.span
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(span.file if span else file.file)}}
    if span is not None:
        physical["region"] = {"startLine": span.line, "startColumn": span.col, "endColumn": span.end_col}
    return {
        "ruleId": diagnostic.code,
        "ruleIndex": codes.index(diagnostic.code),
        "level": diagnostic.severity,
        "message": {"text": _message(diagnostic)},
        "locations": [{"physicalLocation": physical}],
    }


def _uri(file: str) -> str:
    path = Path(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
