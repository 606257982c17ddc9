"""What `peftc merge --undo` keeps, so that `peftc unmerge` gives back the base's exact bytes without the base.

undo.zip
  undo.json            shards of the base with the sha256 of each file, and how each tensor comes back
  headers/SHARD        the shard's header, as it stood
  files/NAME           config, index and other files that the merged directory holds otherwise or not at all
  tensors/N.left, .right, .rest

A tensor that no delta touched is in the merged checkpoint. One that was changed by a product of two narrow factors is
guessed as the merged value less that product, and `rest` is what the guess misses (`peftc.store.residual`). The
factors are rounded so that float64 holds every product and sum of them exactly: the guess is then the same on every
machine, in whatever order a product is summed. Any other change is guessed as nothing: `rest` is then the distance
from the merged tensor, or from the part of a widened one that was there before. What the merged checkpoint has no
counterpart of is kept whole.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from peftc.store.model_dir import CONFIG, INDEX, ModelDir
from peftc.store.residual import encode
from peftc.store.safetensors_io import Header, TensorInfo, as_bytes, read_bytes, read_rows

if TYPE_CHECKING:
    from peftc.fold.updates import Factors

UNDO: Final = "undo.zip"
FORMAT: Final = 1
BLOCK: Final = 1 << 20
"""Elements of a block of rows; part of the format, for the rest of a tensor is written block by block."""
_STEP: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the base stands in a merged one: in all of it, or at the front of each of `streams` equal
    parts of `axis`, 0 or 1, which a fold has made longer."""

    axis: int = 0
    streams: int = 0

    def rows(self, merged: Header, name: str, shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
        """The rows [first, last) of the base's tensor, as they are in the merged one."""
        if not self.streams:
            return read_rows(merged, name, first, last)
        old, new = shape[self.axis] // self.streams, merged.tensors[name].shape[self.axis] // self.streams
        index = torch.arange(first, last) if self.axis == 0 else torch.arange(shape[1])
        index = index // old * new + index % old
        if self.axis == 1:
            return read_rows(merged, name, first, last)[:, index].contiguous()
        begin, end = int(index[0]), int(index[-1]) + 1
        return read_rows(merged, name, begin, end)[index - begin]


def row_blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """The blocks of rows that a tensor of at least one dimension is worked on in."""
    step = max(1, BLOCK // max(1, info.numel // max(1, info.shape[0])))
    for first in range(0, info.shape[0], step):
        yield first, min(first + step, info.shape[0])


def guessed(merged: torch.Tensor, factors: Factors | None, first: int) -> torch.Tensor:
    """What the base's rows from `first` on are taken to be."""
    if factors is None:
        return merged
    left, right = factors
    return (merged.double() - left[first : first + merged.shape[0]] @ right).to(merged.dtype)


def exact_factors(factors: Factors) -> Factors:
    """The factors rounded so that every sum of products of theirs is exact in float64, in float64 and within float32.

    Each row of the left and each column of the right become whole numbers of `bits` bits times a power of two, with
    2 bits + log2(r) <= 53.
    """
    left, right = factors
    bits = min(23, (53 - max(1, left.shape[1]).bit_length()) // 2)

    def rounded(factor: torch.Tensor, axis: int) -> torch.Tensor:
        exponent = torch.frexp(factor.abs().amax(axis, keepdim=True)).exponent
        unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - bits)
        return torch.round(factor / unit) * unit

    left, right = rounded(left, 1), rounded(right, 0)
    return left.float().double(), right.float().double()


def write_undo(
    base: ModelDir,
    directory: Path,
    factors: Callable[[str], Factors | None],
    touched: set[str],
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `undo.zip` into `directory`, which holds `base` merged; `touched` are the stored tensors that a fold
    changed, `factors` what they were changed by. Raises `PeftcError` E031; `OSError`."""
    merged = ModelDir.open(directory)
    place = directory / UNDO
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        writer = _Writer(archive, base, merged, factors, touched, progress or (lambda done, total: None))
        document = {"format": FORMAT, "shards": [writer.shard(header) for header in base.headers]}
        document |= {"tensors": writer.tensors, "files": _files(archive, base, directory)}
        archive.writestr(entry("undo.json"), json.dumps(document, indent=1))
    return place


def entry(name: str) -> zipfile.ZipInfo:
    """A compressed entry without the time of day, so that the same merge writes the same bytes."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


class _Writer:
    def __init__(
        self,
        archive: zipfile.ZipFile,
        base: ModelDir,
        merged: ModelDir,
        factors: Callable[[str], Factors | None],
        touched: set[str],
        progress: Callable[[int, int], None],
    ) -> None:
        self._archive, self._merged = archive, merged
        self._factors, self._touched, self._progress = factors, touched, progress
        self._done, self._total = 0, base.nbytes
        self.tensors: dict[str, dict[str, Any]] = {}

    def shard(self, header: Header) -> dict[str, Any]:
        """Keep what is needed of one file of the base; returns its record."""
        begin = min((info.begin for info in header.tensors.values()), default=header.path.stat().st_size)
        with header.path.open("rb") as file:
            raw = file.read(begin)
        self._archive.writestr(entry(f"headers/{header.path.name}"), raw)
        digest = hashlib.sha256(raw)
        for info in header.tensors.values():
            for block in self._tensor(header, info):
                digest.update(block)
            self._done += info.nbytes
            self._progress(self._done, self._total)
        return {"file": header.path.name, "bytes": header.path.stat().st_size, "sha256": digest.hexdigest()}

    def _tensor(self, header: Header, info: TensorInfo) -> Iterator[bytes | memoryview]:
        """Keep what is needed of one tensor; gives its bytes."""
        here = self._merged.tensors.get(info.name)
        if here is not None and info.name not in self._touched:
            return _pieces(header, info)
        number = str(len(self.tensors))
        place = None if here is None else place_of(header, info, here[0])
        if place is None or here is None:
            self.tensors[info.name] = {"entry": number, "whole": True}
            return self._whole(header, info, number)
        return self._rest(header, info, here[0], place, number)

    def _whole(self, header: Header, info: TensorInfo, number: str) -> Iterator[bytes]:
        with self._archive.open(entry(f"tensors/{number}.rest"), "w", force_zip64=True) as kept:
            for piece in _pieces(header, info):
                kept.write(piece)
                yield piece

    def _rest(
        self, header: Header, info: TensorInfo, merged: Header, place: Place, number: str
    ) -> Iterator[memoryview]:
        found = self._factors(info.name)
        factors = None if found is None else exact_factors(found)
        record = {"entry": number, "axis": place.axis, "streams": place.streams, "rank": 0}
        if factors is not None:
            record["rank"] = factors[0].shape[1]
            for side, factor in zip(("left", "right"), factors, strict=True):
                self._archive.writestr(
                    entry(f"tensors/{number}.{side}"), as_bytes(factor.float().contiguous()).tobytes()
                )
        self.tensors[info.name] = record
        with self._archive.open(entry(f"tensors/{number}.rest"), "w", force_zip64=True) as kept:
            for first, last in row_blocks(info):
                true = read_rows(header, info.name, first, last)
                near = place.rows(merged, info.name, info.shape, first, last)
                for piece in encode(true, guessed(near, factors, first)):
                    kept.write(piece)
                yield as_bytes(true)


def place_of(header: Header, info: TensorInfo, merged: Header) -> Place | None:
    """Where the base's tensor stands in the merged one of its name, or None where it does not."""
    other = merged.tensors[info.name]
    if other.dtype != info.dtype or len(other.shape) != len(info.shape) or not info.shape:
        return None
    longer = [axis for axis, sizes in enumerate(zip(info.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
    if not longer:
        return Place()
    (axis, *more) = longer
    if more or axis > 1 or other.shape[axis] < info.shape[axis] or not info.numel:
        return None
    *_, (first, last) = row_blocks(info)  # of several streams the last one has moved
    true = read_rows(header, info.name, first, last)
    fitting = [n for n in (1, 2) if info.shape[axis] % n == other.shape[axis] % n == 0]
    places = [Place(axis, streams) for streams in fitting]
    return max(places, key=lambda p: int((p.rows(merged, info.name, info.shape, first, last) == true).sum()))


def _pieces(header: Header, info: TensorInfo) -> Iterator[bytes]:
    for start in range(0, info.nbytes, _STEP):
        yield read_bytes(header, info.name, start, _STEP)


def _files(archive: zipfile.ZipFile, base: ModelDir, directory: Path) -> dict[str, dict[str, Any]]:
    """Record the base's other files; keep those that the merged directory does not hold as they are."""
    found = {}
    for path in (base.path / CONFIG, base.path / INDEX, *base.support_files()):
        if not path.is_file():
            continue
        name, data = path.relative_to(base.path).as_posix(), path.read_bytes()
        copy = directory / name
        kept = not copy.is_file() or copy.read_bytes() != data
        if kept:
            archive.writestr(entry(f"files/{name}"), data)
        found[name] = {"sha256": hashlib.sha256(data).hexdigest(), "kept": kept}
    return found
