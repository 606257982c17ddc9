"""What commands share: options, and how a report is printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no report.")]


class Report(Protocol):
    """What every driver function returns."""

    def to_json(self) -> dict[str, Any]: ...

    def render(self, console: Console) -> None: ...


def show(report: Report, *, as_json: bool = False) -> None:
    """Print a report for people, or as JSON."""
    if as_json:
        print_json(report.to_json())
        return
    from rich.console import Console

    report.render(Console())


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
