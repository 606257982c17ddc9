"""The command line as a function, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from peftc.cli import app


@dataclass(frozen=True)
class Told:
    """How a command ended: its exit code and what it said on stderr."""

    code: int
    stderr: str


def run(*arguments: object) -> Told:
    """Run `peftc ARGUMENTS`; an exception that the command line lets through is a bug, and raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Told(result.exit_code, result.stderr)


def refused(code: str, *arguments: object) -> str:
    """Run a command that must be refused with `code`, once, with a remedy where `help` can name one."""
    told = run(*arguments)
    assert told.code == 2, told.stderr
    assert told.stderr.startswith(f"{code} error: "), told.stderr
    assert told.stderr.count(" error: ") == 1, told.stderr
    assert "Traceback" not in told.stderr
    return told.stderr


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file under `directory` with its bytes."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}
