"""Directories written whole or not at all.

Everything is written into a hidden sibling of the target, flushed to the disk, and renamed into place. Whatever
happens before the rename (an error, Ctrl-C, a full disk) leaves the old directory as it was; a killed run leaves a
hidden sibling behind, which the next run removes once its process is dead.

    with atomic_directory(Path("peftc-out"), replace=False) as directory:
        (directory / "peftc.json").write_text(...)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from peftc.diagnostics import fail

MARKERS = ("peftc.json", "certificate.json", "adapters.json")
"""A directory that holds one of these was written by peftc, and only such a one is ever replaced."""

_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk with -o",
    errno.EDQUOT: "your disk quota is used up: free some space, or write elsewhere with -o",
    errno.EACCES: "write to a place you own with -o, or change the permissions",
    errno.EPERM: "write to a place you own with -o, or change the permissions",
    errno.EROFS: "the file system is mounted read-only: write elsewhere with -o",
    errno.EFBIG: "the file system does not take files this large: write elsewhere with -o",
    errno.ENAMETOOLONG: "give a shorter name with -o",
    errno.ENOTDIR: "a part of the path is a file: give another one with -o",
    errno.EEXIST: "a part of the path is a file: give another one with -o",
    errno.EBUSY: "the place is in use or a mount point: write to a directory inside it",
    errno.EXDEV: "the place is a mount point: write to a directory inside it",
    errno.EIO: "the disk reports a fault: write to another disk with -o",
}


@contextlib.contextmanager
def atomic_directory(target: str | Path, *, replace: bool) -> Iterator[Path]:
    """Yield a fresh directory beside `target` that takes its place when the block ends well.

    Missing parents of `target` are made. An existing `target` must be empty, unless `replace` is true and it holds
    one of `MARKERS`; it stays complete and untouched until the new directory is.

    Raises:
        PeftcError: E036, the place cannot be used or an `OSError` came out of the block.
    """
    place = Path(target)
    with _as_diagnostic(place):
        final = place.resolve()  # of a link, what it points to is replaced, not the link
        _check_target(place, final, replace=replace)
        fresh = final.parent / _sibling_name(final.name)
        missing = [parent for parent in final.parents if not parent.exists()]  # innermost first
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _clean_leftovers(final)
            fresh.mkdir()
            yield fresh
            _flush(fresh)
            _check_target(place, final, replace=replace)  # something may have come there meanwhile
            _move_into_place(fresh, final)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            for parent in missing:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def check_target(target: str | Path, *, replace: bool) -> None:
    """Refuse now what `atomic_directory` would refuse later. Raises `PeftcError` E036."""
    place = Path(target)
    with _as_diagnostic(place):
        _check_target(place, place.resolve(), replace=replace)


@contextlib.contextmanager
def atomic_files(target: str | Path, *, last: str) -> Iterator[Path]:
    """Yield a fresh directory inside `target`, whose files replace those of their names when the block ends well.

    Other files of `target` stay. Each file is replaced whole, `last` after all others.

    Raises:
        PeftcError: E036, `target` is not a directory that can be written to, or an `OSError` came out of the block.
    """
    place = Path(target)
    with _as_diagnostic(place):
        if not place.is_dir():
            fail("E036", f"{place} is a file, not a directory", help="give another place")
        _clean_leftovers(place / "save")
        fresh = place / _sibling_name("save")
        fresh.mkdir()
        try:
            yield fresh
            _flush(fresh)
            files = [file for file in fresh.rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: (file.name == last, file)):
                goal = place / file.relative_to(fresh)
                goal.parent.mkdir(parents=True, exist_ok=True)
                file.replace(goal)
            _flush_one(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def check_free_space(path: str | Path, size: int) -> None:
    """Refuse, before anything is written, to write `size` bytes to a disk that has not as many left.

    Raises:
        PeftcError: E036, too little space.
    """
    place = Path(path).absolute()
    with _as_diagnostic(Path(path)):
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
    if free < size:
        message = f"{_human(size)} are needed in {place.parent}, and {_human(free)} are free"
        fail("E036", message, help=_REMEDIES[errno.ENOSPC])


def _human(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _check_target(place: Path, final: Path, *, replace: bool) -> None:
    if final == Path.cwd() or final in Path.cwd().parents or not final.name:
        fail("E036", f"{place} is the current directory or holds it", help="name a directory to be made, with -o")
    if not final.exists():
        return
    if not final.is_dir():
        fail("E036", f"{place} is a file, not a directory", help="give another place with -o")
    if not any(final.iterdir()):
        return
    if not any((final / marker).is_file() for marker in MARKERS):
        message = f"{place} exists and was not written by peftc, so it is not replaced"
        fail("E036", message, help="give another place with -o, or remove it yourself")
    if not replace:
        fail("E036", f"{place} exists", help="give another place with -o, or remove it yourself")


def _host() -> str:
    # Process ids mean nothing on another host or in another container that shares the disk.
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _sibling_name(name: str) -> str:
    return f".{name}.peftc-{os.getpid()}-{_host()}{secrets.token_hex(3)}"


def _clean_leftovers(final: Path) -> None:
    """Remove what killed runs left beside `final`; put an old directory back whose replacement never came."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.peftc-(\d+)-{_host()}[0-9a-f]{{6}}(\.old)?")
    for entry in sorted(final.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2] and not final.exists():
            entry.rename(final)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there is no harmless way to ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _move_into_place(fresh: Path, final: Path) -> None:
    if not final.exists():
        fresh.rename(final)
        _flush_one(final.parent)
        return
    old = fresh.with_name(fresh.name + ".old")
    try:
        final.rename(old)
        fresh.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    _flush_one(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(directory: Path) -> None:
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            _flush_one(Path(root) / name)
        _flush_one(Path(root))


def _flush_one(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX flushes directories
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_diagnostic(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the operating system: a library's own error, with a traceback to keep
            raise
        _fail_write(place, error)


def _fail_write(place: Path, error: OSError) -> NoReturn:
    where = place
    written = error.filename if error.filename2 is None else error.filename2  # of a copy, the second is the target
    if isinstance(written, str | os.PathLike):
        name = Path(written)
        inside = next((parent for parent in (name, *name.parents) if ".peftc-" in parent.name), None)
        where = place / name.relative_to(inside) if inside else name
    cause = error.strerror or str(error)
    help = _REMEDIES.get(error.errno or 0, "write to another place with -o")
    fail("E036", f"cannot write {where}: {cause}", help=help)
