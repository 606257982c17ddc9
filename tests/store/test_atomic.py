"""Directories are written whole or not at all, whatever ends the run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftc.diagnostics import Diagnostic, PeftcError
from peftc.store import atomic, safetensors_io
from peftc.store.atomic import atomic_directory, check_free_space


def _old(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    target.mkdir()
    (target / "peftc.json").write_text("old")
    return target


def _content(target: Path) -> str:
    return (target / "peftc.json").read_text()


def _write(target: Path, text: str, *, replace: bool = False) -> None:
    with atomic_directory(target, replace=replace) as directory:
        (directory / "peftc.json").write_text(text)


def _refused(act: Callable[[], object]) -> Diagnostic:
    with pytest.raises(PeftcError) as caught:
        act()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E036"
    assert diagnostic.help
    return diagnostic


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _leftover(target: Path, pid: int, tail: str = "") -> Path:
    path = target.parent / f".{target.name}.peftc-{pid}-{atomic._host()}0a1b2c{tail}"
    path.mkdir()
    (path / "peftc.json").write_text("left over")
    return path


def test_new_directory_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with atomic_directory(target, replace=False) as directory:
        (directory / "sub").mkdir()
        (directory / "peftc.json").write_text("new")
        assert directory.name.startswith(f".out.peftc-{os.getpid()}-")
        assert not target.exists()
    assert _content(target) == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["out"]


def test_old_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = _old(tmp_path)
    (target / "stale").write_text("")
    _write(target, "new", replace=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in target.iterdir()] == ["peftc.json"]
    assert _content(target) == "new"


def test_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target = _old(tmp_path)
    (tmp_path / "link").symlink_to(target)
    _write(tmp_path / "link", "new", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert _content(target) == "new"


def test_empty_directory_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out", "new")
    assert _content(tmp_path / "out") == "new"


def test_existing_output_is_kept_unless_replacing_is_asked_for(tmp_path: Path) -> None:
    target = _old(tmp_path)
    diagnostic = _refused(lambda: _write(target, "new"))
    assert "exists" in diagnostic.message
    assert "remove it yourself" in str(diagnostic.help)
    assert _content(target) == "old"


@pytest.mark.parametrize("replace", [False, True])
def test_directory_that_peftc_did_not_write_is_never_replaced(replace: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    diagnostic = _refused(lambda: _write(tmp_path / "thesis", "new", replace=replace))
    assert "not written by peftc" in diagnostic.message
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"


def test_current_directory_and_files_are_refused_as_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _old(tmp_path)
    (target / "inside").mkdir()
    monkeypatch.chdir(target / "inside")
    assert "current directory" in _refused(lambda: _write(Path(), "new", replace=True)).message
    assert "current directory" in _refused(lambda: _write(target, "new", replace=True)).message
    assert "is a file" in _refused(lambda: _write(target / "peftc.json", "new", replace=True)).message
    assert "a file: give" in str(_refused(lambda: _write(target / "peftc.json" / "x", "new")).help)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_exception_leaves_the_old_directory_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    target = _old(tmp_path)
    with pytest.raises(error), atomic_directory(target, replace=True) as directory:
        (directory / "peftc.json").write_text("half")
        raise error
    assert _content(target) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_parents_made_for_a_failed_run_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_directory(tmp_path / "a" / "b" / "out", replace=False):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_failing_write_names_place_cause_and_remedy(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _old(tmp_path)

    def write(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(next(tmp_path.glob(".out*")) / "delta.safetensors"))

    monkeypatch.setattr(safetensors_io, "_write_all", write)

    def run() -> None:
        with atomic_directory(target, replace=True) as directory:
            spec = safetensors_io.TensorSpec("w", "F32", (4,))
            safetensors_io.write(directory / "delta.safetensors", [spec], lambda _: torch.ones(4))

    diagnostic = _refused(run)
    assert diagnostic.message == f"cannot write {target / 'delta.safetensors'}: {os.strerror(number)}"
    assert "-o" in str(diagnostic.help)
    assert _content(target) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_reported_and_the_old_directory_intact(tmp_path: Path) -> None:
    target = _old(tmp_path)

    def run() -> None:
        with atomic_directory(target, replace=True) as directory:
            (directory / "delta.safetensors").symlink_to("/dev/full")
            spec = safetensors_io.TensorSpec("w", "F32", (4,))
            safetensors_io.write(directory / "delta.safetensors", [spec], lambda _: torch.ones(4))

    assert os.strerror(errno.ENOSPC) in _refused(run).message
    assert _content(target) == "old"


def test_full_disk_during_a_copy_names_the_copy_and_not_its_source(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def run() -> None:
        with atomic_directory(target, replace=False) as directory:  # raised as by shutil.copyfile
            copy = str(directory / "tokenizer.json")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "base/tokenizer.json", None, copy)

    message = f"cannot write {target / 'tokenizer.json'}: {os.strerror(errno.ENOSPC)}"
    assert _refused(run).message == message


def test_disk_that_fills_at_the_flush_leaves_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _old(tmp_path)

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    _refused(lambda: _write(target, "new", replace=True))
    assert _content(target) == "old"


def test_library_error_that_is_no_system_error_keeps_its_type(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no model"), atomic_directory(tmp_path / "out", replace=False):
        raise OSError("no model named bert")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "fault"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_old_directory_returns_when_the_second_rename_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _old(tmp_path)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and not self.name.endswith(".old"):
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((PeftcError, KeyboardInterrupt)):
        _write(target, "new", replace=True)
    assert _content(target) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_dead_runs_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    target = _old(tmp_path)
    dead = _leftover(target, _dead_pid())
    aside = _leftover(target, _dead_pid(), ".old")
    alive = _leftover(target, os.getppid())
    elsewhere = tmp_path / f".out.peftc-{_dead_pid()}-ffffff0a1b2c"  # of another host
    elsewhere.mkdir()
    other = _leftover(tmp_path / "other", _dead_pid())
    _write(target, "new", replace=True)
    assert not dead.exists()
    assert not aside.exists()
    assert alive.exists()
    assert elsewhere.exists()
    assert other.exists()


def test_run_killed_between_the_renames_gives_its_old_directory_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    _leftover(target, _dead_pid(), ".old")
    with pytest.raises(ValueError), atomic_directory(target, replace=True):
        raise ValueError
    assert _content(target) == "left over"


_CHILD = """
import sys, time
from pathlib import Path
from peftc.store.atomic import atomic_directory
with atomic_directory(Path(sys.argv[1]), replace=True) as directory:
    (directory / "peftc.json").write_text("half")
    print("inside", flush=True)
    time.sleep(60)
"""


def _run_and_signal(target: Path, number: signal.Signals) -> int:
    command = [sys.executable, "-c", _CHILD, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        child.send_signal(number)
        return child.wait(timeout=30)


def test_killed_run_leaves_the_old_directory_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = _old(tmp_path)
    assert _run_and_signal(target, signal.SIGKILL) == -signal.SIGKILL
    assert _content(target) == "old"
    assert len(list(tmp_path.iterdir())) == 2
    _write(target, "new", replace=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    target = _old(tmp_path)
    assert _run_and_signal(target, signal.SIGINT) != 0
    assert _content(target) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_too_little_space_is_refused_before_writing(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet" / "there", 1)
    diagnostic = _refused(lambda: check_free_space(tmp_path / "out", 1 << 70))
    assert "GiB are needed" in diagnostic.message
