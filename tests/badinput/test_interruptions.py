"""A full disk, Ctrl-C, SIGTERM and kill -9 while a directory is written: the old one is whole, or there is none."""

from __future__ import annotations

import errno
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from badinput.command import refused, run, snapshot

WRITERS = {"apply": "peftc.runtime.delta_dir.write", "merge": "peftc.backends.hf.write_shards"}


@pytest.fixture(params=["apply", "merge"])
def command(request: pytest.FixtureRequest, tiny: Path, lora: Path) -> tuple[str, list[object]]:
    """A command that writes, and where its tensors are written."""
    writer = WRITERS[request.param]
    if request.param == "apply":
        return writer, ["apply", "lora", tiny, "--seed", "1", "-o", "out"]
    return writer, ["merge", lora, "-o", "out"]


def half_written_then(original: Callable[..., None], error: BaseException) -> Callable[..., None]:
    """A function that writes a file, or a directory of them, cut short by half, and then fails."""

    def write(path: Path, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        file = path if path.is_file() else next(path.glob("*.safetensors"))
        os.truncate(file, file.stat().st_size // 2)
        raise error

    return write


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "new"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=["disk full", "Ctrl-C"],
)
def test_failed_write_leaves_what_was_there(
    command: tuple[str, list[object]],
    tiny: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    old: bool,
) -> None:
    writer, arguments = command
    if old:
        assert run("apply", "bitfit", tiny, "-o", "out", "-q").code == 0
    before = snapshot(place)
    monkeypatch.setattr(writer, half_written_then(pkgutil.resolve_name(writer), error))
    if isinstance(error, KeyboardInterrupt):
        told = run(*arguments)
        assert told.code == 130
        assert "interrupted" in told.stderr
        assert "Traceback" not in told.stderr
    else:
        told_text = refused("E036", *arguments)
        assert os.strerror(error.errno or 0) in told_text
        assert "free some space" in told_text
    assert snapshot(place) == before
    assert [entry.name for entry in place.iterdir()] == (["out"] if old else [])


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_destination_is_refused(tiny: Path, place: Path) -> None:
    place.chmod(0o555)
    try:
        assert "you own" in refused("E036", "apply", "lora", tiny)
    finally:
        place.chmod(0o755)


def test_destination_that_cannot_be_made_is_refused(tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "Permission denied" in refused("E036", "apply", "lora", tiny)


SLOW = """
import sys, time
import peftc.runtime.delta_dir as place, peftc.backends.hf as other
def slow(write):
    def first_then_wait(*args, **kwargs):
        write(*args, **kwargs)
        print("writing", flush=True)
        time.sleep(60)
    return first_then_wait
place.write, other.write_shards = slow(place.write), slow(other.write_shards)
from peftc.cli import main
sys.argv = ["peftc", *sys.argv[1:]]
main()
"""


def interrupted(arguments: list[object], number: signal.Signals) -> tuple[int, str]:
    """Run a command, send it `number` in the midst of its writing; its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "writing\n":
            break
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.slow
def test_signals_in_the_midst_of_writing_leave_the_old_directory(tiny: Path, lora: Path, place: Path) -> None:
    assert run("apply", "bitfit", tiny, "-o", "out", "-q").code == 0
    before = snapshot(place)
    apply: list[object] = ["apply", "lora", tiny, "-o", "out", "-q"]
    told = interrupted(apply, signal.SIGTERM)
    assert told == (130, "peftc: interrupted; nothing half-written was left behind\n")
    assert snapshot(place) == before
    assert [entry.name for entry in place.iterdir()] == ["out"]
    code, _ = interrupted(["merge", lora, "-o", "out", "-q"], signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert snapshot(place / "out") == {name.removeprefix("out/"): data for name, data in before.items()}
    assert len(list(place.iterdir())) == 2, "a killed run leaves its hidden sibling"
    assert run(*apply).code == 0
    assert [entry.name for entry in place.iterdir()] == ["out"], "and the next run removes it"
