"""Shards written from other shards: most bytes are copied as they are, some tensors are produced block by block.

A shard whose tensors keep their dtypes and shapes keeps its header and the order of its tensors, byte for byte.

    shards = same_layout(base.headers, specs, added)
    write_shards(directory, shards, produce, progress)
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from peftc.store.safetensors_io import Header, TensorSpec, encode_header, in_file_order

Block = bytes | bytearray | memoryview
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_STEP = 1 << 25  # a full disk is noticed, and Ctrl-C answered, within 32 MiB


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a shard: copied from `source` as it stands there, or, without one, produced."""

    spec: TensorSpec
    source: Header | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write. `like` is the file whose header it keeps, where nothing in that changes."""

    file: str
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str]
    like: Header | None = None

    @property
    def nbytes(self) -> int:
        return sum(piece.spec.nbytes for piece in self.pieces)


Produce = Callable[[TensorSpec], Iterator[Block]]
"""The bytes of a tensor, in blocks of its order. Several tensors are produced at once, each on a thread of its own."""
Progress = Callable[[int, int], None]


def same_layout(headers: Sequence[Header], pieces: Mapping[str, Piece], added: Sequence[Piece] = ()) -> list[Shard]:
    """A shard for each of `headers`, of those of its tensors that `pieces` holds; the last takes what is `added`."""
    shards = []
    for header in headers:
        own = [pieces[name] for name in header.tensors if name in pieces]
        own += added if header is headers[-1] else ()
        shards.append(_shard(header.path.name, own, header.metadata, header))
    return shards


def resharded(pieces: Iterable[Piece], most: int, metadata: Mapping[str, str]) -> list[Shard]:
    """Shards of at most `most` bytes each, in the order of `pieces`; a larger tensor has a shard of its own."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.spec.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.spec.nbytes
    if len(groups) == 1:
        return [_shard(SINGLE, groups[0], metadata, None)]
    count = len(groups)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [_shard(name, group, metadata, None) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, pieces: Sequence[Piece], metadata: Mapping[str, str], like: Header | None) -> Shard:
    specs = [piece.spec for piece in pieces]
    if like is not None and specs == [TensorSpec(i.name, i.dtype, i.shape) for i in like.tensors.values()]:
        return Shard(file, tuple(pieces), metadata, like)
    of = {piece.spec.name: piece for piece in pieces}
    return Shard(file, tuple(of[spec.name] for spec in in_file_order(specs)), metadata or {"format": "pt"})


def write_shards(
    directory: Path,
    shards: Sequence[Shard],
    produce: Produce,
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Write every shard, and the index where there is more than one; each is on the disk when this returns.

    Every tensor has its place in its file, so `threads` of them (default: a thread for each core, four at most) are
    copied or produced, and written, side by side, and a file that is whole goes to the disk meanwhile. Raises
    `OSError` (the disk is full, and the like), and what `produce` raises.
    """
    team = _Team(sum(shard.nbytes for shard in shards), produce, progress)
    with ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
        given: list[Future[None]] = []
        try:
            for shard in shards:
                path, header = directory / shard.file, _header(shard)
                path.write_bytes(header)
                parts = [pool.submit(team.write, path, place, run) for place, run in _places(shard, len(header))]
                given += [*parts, flusher.submit(_flush, path, parts)]
            for future in wait(given, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            team.stop.set()
            for future in given:
                future.cancel()
            raise
    if len(shards) > 1:
        _write_index(directory, shards)


class _Team:
    """What the threads share: how many bytes are done, and whether to go on."""

    def __init__(self, total: int, produce: Produce, progress: Progress | None) -> None:
        self.stop = threading.Event()
        self._total, self._produce, self._progress = total, produce, progress
        self._done, self._lock = 0, threading.Lock()

    def write(self, path: Path, place: int, run: Sequence[Piece]) -> None:
        """Copy or produce neighbouring tensors, which begin at `place` of a file that is there already."""
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            for size in self._produced(file, run[0].spec) if run[0].source is None else _copied(file, run):
                with self._lock:
                    self._done += size
                    if self._progress is not None:
                        self._progress(self._done, self._total)
                if self.stop.is_set():
                    return

    def _produced(self, file: IO[bytes], spec: TensorSpec) -> Iterator[int]:
        for block in self._produce(spec):
            _write_all(file, block)
            yield len(block)


def _copied(file: IO[bytes], run: Sequence[Piece]) -> Iterator[int]:
    source = run[0].source
    assert source is not None
    begin, end = source.tensors[run[0].spec.name].begin, source.tensors[run[-1].spec.name].end
    for start in range(begin, end, _STEP):
        size = min(_STEP, end - start)
        _copy(file, source.path, start, size)
        yield size


def _places(shard: Shard, place: int) -> Iterator[tuple[int, list[Piece]]]:
    """The runs of a shard and where each begins in its file."""
    for run in _runs(shard.pieces):
        yield place, run
        place += sum(piece.spec.nbytes for piece in run)


def _runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Neighbours that are copied from neighbouring places, together; each produced tensor by itself."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _follows(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _follows(one: Piece, other: Piece) -> bool:
    if one.source is None or one.source is not other.source:
        return False
    return one.source.tensors[one.spec.name].end == one.source.tensors[other.spec.name].begin


def _header(shard: Shard) -> bytes:
    if shard.like is None:
        return encode_header([piece.spec for piece in shard.pieces], shard.metadata)
    with shard.like.path.open("rb") as file:
        return file.read(min((info.begin for info in shard.like.tensors.values()), default=-1))


def _copy(target: IO[bytes], path: Path, start: int, size: int) -> None:
    """Copy a range of a file to where another stands, in the kernel where it can."""
    with path.open("rb", buffering=0) as source:
        while size:
            copied = _copy_some(source, target, start, size)
            start, size = start + copied, size - copied


def _copy_some(source: IO[bytes], target: IO[bytes], start: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), size, start)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
        else:
            if copied:
                return copied
    source.seek(start)
    block = source.read(size)
    if not block:
        raise OSError(errno.EIO, "the file became shorter while it was read", source.name)
    _write_all(target, block)
    return len(block)


def _write_all(file: IO[bytes], block: Block) -> None:
    view = memoryview(block)
    while view.nbytes:
        view = view[file.write(view[:_STEP]) :]


def _flush(path: Path, parts: Sequence[Future[None]]) -> None:
    """Bring a file to the disk once all of its parts are written."""
    if all(part.exception() is None for part in parts):
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _write_index(directory: Path, shards: Sequence[Shard]) -> None:
    places = {piece.spec.name: shard.file for shard in shards for piece in shard.pieces}
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": dict(sorted(places.items())),
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
