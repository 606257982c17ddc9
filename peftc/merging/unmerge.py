"""Unmerging: the base's exact bytes from a merged checkpoint and the `undo.zip` beside it.

Nothing is traced and no delta is asked for. Every file is written again as it stood, hashed on the way, and compared
with the sha256 that was taken of the base; the destination appears only when all of them agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch

from peftc.diagnostics import PeftcError, fail
from peftc.merging.certificate import CERTIFICATE
from peftc.merging.undo import FORMAT, UNDO, Place, guessed, row_blocks
from peftc.progress import Progress
from peftc.store.atomic import atomic_directory, check_free_space
from peftc.store.model_dir import CONFIG, ModelDir
from peftc.store.residual import decode
from peftc.store.safetensors_io import Header, TensorInfo, as_bytes, read_bytes, read_header

if TYPE_CHECKING:
    from rich.console import Console

    from peftc.fold.updates import Factors

_STEP = 1 << 24
_MOST = 1 << 28
"""Bytes of a file that is kept whole: a config, a tokenizer, the header of a shard."""
_LARGEST = 1 << 60


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What was restored: tensors that had changed, tensors that had not, files."""

    out: Path
    restored: int
    copied: int
    files: int

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "restored": self.restored, "copied": self.copied, "files": self.files}

    def render(self, console: Console) -> None:
        console.print(f"{self.restored} tensors restored, {self.copied} copied; {self.files} files, each byte for byte")
        console.print(f"wrote [bold]{self.out}[/bold]")


def unmerge(directory: Path, out: Path, progress: Progress) -> UnmergeReport:
    """Restore the base of a merged `directory` into `out`.

    Raises `PeftcError`: E034 (never merged, no undo.zip, or one that is not whole), E030, E031, E036, E054 (what comes
    out is not the base, for the merged checkpoint or undo.zip has changed since).
    """
    merged = ModelDir.open(directory)
    merged.require_weights()
    if not (directory / UNDO).is_file():
        written = (directory / CERTIFICATE).is_file()
        why = "it was merged without --undo" if written else f"it has no {CERTIFICATE} either: no merge wrote it"
        fail("E034", f"{directory} holds no {UNDO}: {why}", help=_without(directory))
    progress.step("restore the base")
    read: list[str] = []
    try:
        with _opened(directory / UNDO) as archive:
            undo = _Undo(archive, merged, read)
            check_free_space(out, sum(shard["bytes"] for shard in undo.document["shards"]))
            with atomic_directory(out, replace=False) as fresh:
                return undo.restore(fresh, out, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ValueError) as error:
        place = f"{directory / UNDO}" + "".join(f", {name}" for name in read[-1:])
        fail("E034", f"{place} is damaged: {_cause(error)}", help=_without(directory))


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise ValueError(_unread(error)) from error


def _unread(error: OSError) -> str:
    """An offset out of nowhere is an error of the system's, and is none of the place that is written to."""
    return f"it cannot be read: {error.strerror or error}"


def _cause(error: Exception) -> str:
    if isinstance(error, KeyError):
        return str(error.args[0])
    return "it ends too early" if isinstance(error, EOFError) else str(error)


def _without(directory: Path) -> str:
    """How to come by the base otherwise."""
    try:
        base = json.loads((directory / CERTIFICATE).read_bytes())["base_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return "the base itself is what to copy; `peftc merge --undo` keeps what can restore it"
    return f"the base was {base}: copy it from there; `peftc merge --undo` keeps what can restore it"


class _Undo:
    """An opened undo.zip; what it says is checked where it is used, and each entry that is read is noted in `read`."""

    def __init__(self, archive: zipfile.ZipFile, merged: ModelDir, read: list[str]) -> None:
        self._archive, self._merged, self._read = archive, merged, read
        for entry in archive.infolist():
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{entry.filename} is not stored as peftc does")
        self.document = _checked(json.loads(self._whole("undo.json")))
        self._done, self._total = 0, sum(shard["bytes"] for shard in self.document["shards"])
        self._restored = self._copied = 0

    def restore(self, fresh: Path, out: Path, progress: Progress) -> UnmergeReport:
        for shard in self.document["shards"]:
            self._shard(fresh / _plain(shard["file"]), shard, progress)
        for name, record in self.document["files"].items():
            self._file(fresh, name, record)
        files = len(self.document["shards"]) + len(self.document["files"])
        if not (fresh / CONFIG).is_file():
            raise ValueError(f"it holds no {CONFIG}")
        return UnmergeReport(out, self._restored, self._copied, files)

    def _whole(self, name: str, most: int = _MOST) -> bytes:
        self._read.append(name)
        size = self._archive.getinfo(name).file_size
        if size > most:
            raise ValueError(f"it has {size} bytes")
        with self._entry(name) as entry:
            return entry.read()

    def _open(self, name: str) -> IO[bytes]:
        self._read.append(name)
        return self._entry(name)

    def _entry(self, name: str) -> IO[bytes]:
        try:
            return self._archive.open(name)
        except OSError as error:
            raise ValueError(_unread(error)) from error

    def _shard(self, path: Path, record: dict[str, Any], progress: Progress) -> None:
        raw = self._whole(f"headers/{path.name}")
        path.write_bytes(raw)
        os.truncate(path, record["bytes"])  # a hole, which the tensors fill
        try:
            header = read_header(path)
        except PeftcError as error:  # of the entry, not of a file that is gone when it is read
            raise ValueError(error.diagnostics[0].message.removeprefix(f"{path}: ")) from error
        digest = hashlib.sha256(raw)
        with path.open("r+b") as file:
            file.seek(len(raw))
            for info in header.tensors.values():
                for block in self._tensor(header, info):
                    digest.update(block)
                    file.write(block)
                    self._done += len(block)
                    progress.update(self._done, self._total)
        if digest.hexdigest() != record["sha256"]:
            self._differs(path.name)

    def _tensor(self, header: Header, info: TensorInfo) -> Iterator[bytes | memoryview]:
        record = self.document["tensors"].get(info.name)
        if record is None:
            self._copied += 1
            return self._copy(info)
        self._restored += 1
        if record.get("whole"):
            return self._kept(info, record)
        return self._near(header, info, record)

    def _copy(self, info: TensorInfo) -> Iterator[bytes]:
        header = self._of(info)
        if header.tensors[info.name].nbytes != info.nbytes:
            self._differs(info.name)
        for start in range(0, info.nbytes, _STEP):
            yield read_bytes(header, info.name, start, _STEP)

    def _kept(self, info: TensorInfo, record: dict[str, Any]) -> Iterator[bytes]:
        with self._open(f"tensors/{record['entry']}.rest") as entry:
            for start in range(0, info.nbytes, _STEP):
                yield _exactly(entry, min(_STEP, info.nbytes - start))

    def _near(self, header: Header, info: TensorInfo, record: dict[str, Any]) -> Iterator[memoryview]:
        merged, place = self._of(info), Place(record["axis"], record["streams"])
        if not _fits(place, info, merged.tensors[info.name]):
            self._differs(info.name)
        factors = self._factors(info, record)
        with self._open(f"tensors/{record['entry']}.rest") as entry:
            for first, last in row_blocks(info):
                near = place.rows(merged, info.name, info.shape, first, last)
                yield as_bytes(decode(guessed(near, factors, first), entry.read))

    def _factors(self, info: TensorInfo, record: dict[str, Any]) -> Factors | None:
        rank = record["rank"]
        if not rank:
            return None
        rows, columns = info.shape
        if rank > rows + columns:
            raise ValueError(f"{info.name} has factors of rank {rank}")
        sides = zip(("left", "right"), ((rows, rank), (rank, columns)), strict=True)
        left, right = (self._factor(f"tensors/{record['entry']}.{side}", shape) for side, shape in sides)
        return left, right

    def _factor(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        size = 4 * shape[0] * shape[1]  # as long as a vocabulary
        data = bytearray(self._whole(name, size))
        if len(data) != size:
            raise ValueError(f"it is not {list(shape)}")
        return torch.frombuffer(data, dtype=torch.float32).reshape(shape).double()

    def _of(self, info: TensorInfo) -> Header:
        if info.name not in self._merged.tensors:
            self._differs(info.name)
        return self._merged.tensors[info.name][0]

    def _file(self, fresh: Path, name: str, record: dict[str, Any]) -> None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or len(path.parts) > 2:
            raise ValueError(f"it names a file outside its directory: {name}")
        source = self._merged.path / path
        if not record["kept"] and not source.is_file():
            self._differs(name)
        data = self._whole(f"files/{name}") if record["kept"] else source.read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            self._differs(name)
        (fresh / path).parent.mkdir(exist_ok=True)
        (fresh / path).write_bytes(data)

    def _differs(self, name: str) -> NoReturn:
        place = self._merged.path
        message = f"{place}: {name} does not come back as it was: the merged checkpoint or {UNDO} has changed since"
        fail("E054", message, help=f"`peftc verify {place}` says what changed. " + _without(place))


_SHARD = {"file": str, "bytes": int, "sha256": str}
_WHOLE = {"entry": str, "whole": bool}
_NEAR = {"entry": str, "axis": int, "streams": int, "rank": int}
_FILE = {"sha256": str, "kept": bool}


def _checked(document: Any) -> dict[str, Any]:
    """undo.json with every value of its kind. Raises `ValueError`."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    for key, kind in (("shards", list), ("tensors", dict), ("files", dict)):
        if not isinstance(document.get(key), kind) or (key == "shards" and not document[key]):
            raise ValueError(f"it has no {key}")
    for shard in document["shards"]:
        _check(shard, _SHARD, "a shard")
    for name, record in document["tensors"].items():
        _check(record, _WHOLE if isinstance(record, dict) and "whole" in record else _NEAR, name)
    for name, record in document["files"].items():
        _check(record, _FILE, name)
    return document


def _check(record: Any, kinds: Mapping[str, type], what: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"of {what} it says nothing")
    for key, kind in kinds.items():
        value = record.get(key)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < _LARGEST):
            raise ValueError(f"`{key}` of {what} is no {kind.__name__} that it may be")


def _plain(name: str) -> str:
    if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"it names a file outside its directory: {name}")
    return name


def _fits(place: Place, info: TensorInfo, merged: TensorInfo) -> bool:
    """Whether the tensor of the base can stand there in the merged one."""
    if merged.dtype != info.dtype or len(merged.shape) != len(info.shape) or not info.shape:
        return False
    if not place.streams:
        return merged.shape == info.shape
    longer = [axis for axis, sizes in enumerate(zip(info.shape, merged.shape, strict=True)) if sizes[0] != sizes[1]]
    if place.axis not in (0, 1) or longer != [place.axis]:
        return False
    old, new = info.shape[place.axis], merged.shape[place.axis]
    return old % place.streams == new % place.streams == 0 and new > old


def _exactly(entry: IO[bytes], size: int) -> bytes:
    data = entry.read(size)
    if len(data) != size:
        raise EOFError
    return data
