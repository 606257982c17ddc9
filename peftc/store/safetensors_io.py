"""Safetensors files: the header alone, one tensor at a time, and a writer that streams.

A base model may be larger than memory, so nothing here holds more than one tensor, and a header is read and checked
without torch. A file is trusted only after its offsets were checked: every byte belongs to exactly one tensor.
The writer orders tensors as the safetensors library does (widest dtype first, then by name), so every tensor is
aligned to its own element size.

    header = read_header(path)
    header.tensors["classifier.weight"].shape   # (3, 384)
    read_tensor(header, "classifier.weight")
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, TypeGuard

from peftc.diagnostics import fail

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview
Produce = Callable[[str], "torch.Tensor | bytes | bytearray | memoryview"]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, after each tensor."""

MAX_HEADER: Final = 100_000_000
_AGAIN = "download or copy the file again"

# code -> (bits of an element, name of the torch dtype); in the order in which the library lays tensors out
_DTYPES: Final[dict[str, tuple[int, str]]] = {
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F32": (32, "float32"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "BF16": (16, "bfloat16"),
    "F16": (16, "float16"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "F6_E3M2": (6, ""),
    "F6_E2M3": (6, ""),
    "F4": (4, ""),
    "BOOL": (8, "bool"),
}
_RANK: Final = {code: rank for rank, code in enumerate(_DTYPES)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file: `dtype` is the safetensors code; its bytes are [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `dtype` is the safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds, by name in file order, and its free-form metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The bytes a tensor takes in a file; `dtype` is a safetensors code."""
    return math.prod(shape) * _DTYPES[dtype][0] // 8


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype.

    Raises:
        KeyError: the format has no such dtype.
    """
    name = str(dtype).removeprefix("torch.")
    return {torch_name: code for code, (_, torch_name) in _DTYPES.items() if torch_name}[name]


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code.

    Raises:
        PeftcError: E031, torch has no such dtype.
    """
    import torch

    dtype = getattr(torch, _DTYPES[code][1] or "-", None)
    if dtype is None:
        fail("E031", f"dtype {code} has no counterpart in torch", help="convert the file to a dtype such as BF16")
    return dtype


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        PeftcError: E031, the file cannot be read, is no safetensors file, or its size and offsets disagree.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            raw = _raw_header(file, path, size)
    except OSError as error:
        fail("E031", f"{path}: cannot be read: {error.strerror or error}", help="check the path and its permissions")
    document = _parse(raw, path)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _bad(path, "the header's __metadata__ is not a mapping of text to text")
    data = 8 + len(raw)
    infos = [_info(path, name, entry, data) for name, entry in document.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    _check_layout(path, infos, data, size)
    return Header(path, {info.name: info for info in infos}, metadata)


def _raw_header(file: BinaryIO, path: Path, size: int) -> bytes:
    file.seek(0)
    start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        _bad(path, "this is a Git LFS pointer, not the file itself", help="run `git lfs pull` in its repository")
    if size < 10:
        _bad(path, f"the file is too short ({size} bytes) to hold a header")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > MAX_HEADER:
        message = f"this is no safetensors file (its first 8 bytes, read as a header's length, say {length})"
        _bad(path, message, help="convert the weights to safetensors, or " + _AGAIN)
    if length > size - 8:
        _bad(path, f"the file is truncated: a header of {length} bytes is announced, {size - 8} bytes follow")
    file.seek(8)
    return file.read(length)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        _bad(path, f"the header is not valid JSON: {error}")
    if not isinstance(document, dict):
        _bad(path, "the header is not a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"`{twice}` is there twice")
    return result


def _info(path: Path, name: str, entry: object, data: int) -> TensorInfo:
    if not isinstance(entry, dict):
        _bad(path, f"the header's entry for `{name}` is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _bad(path, f"`{name}` has the unknown dtype {dtype!r}", help="does this file need a newer peftc?")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        _bad(path, f"the header's entry for `{name}` has a bad shape or bad offsets")
    begin, end = offsets
    if end - begin != tensor_bytes(dtype, shape):
        _bad(path, f"`{name}`, {dtype} {list(shape)}, needs {tensor_bytes(dtype, shape)} bytes and has {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), data + begin, data + end)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, infos: Sequence[TensorInfo], data: int, size: int) -> None:
    position, before = data, "the header"
    for info in infos:
        if info.begin < position:
            _bad(path, f"`{info.name}` overlaps `{before}`")
        if info.begin > position:
            _bad(path, f"{info.begin - position} bytes before `{info.name}` belong to no tensor")
        position, before = info.end, info.name
    if position > size:
        lost = next(info.name for info in infos if info.end > size)
        _bad(path, f"the file is truncated: `{lost}` runs past its end; {position} bytes are needed, {size} are there")
    if position < size:
        _bad(path, f"{size - position} bytes at the end belong to no tensor")


def _bad(path: Path, message: str, help: str = _AGAIN) -> NoReturn:
    fail("E031", f"{path}: {message}", help=help)


def read_bytes(header: Header, name: str, start: int = 0, length: int | None = None) -> bytes:
    """The bytes [start, start + length) of a tensor (default: to its end), clipped to the tensor.

    Raises:
        PeftcError: E031, the file cannot be read or has changed since its header was read.
        KeyError: the file has no tensor of that name.
    """
    info = header.tensors[name]
    begin = min(info.begin + start, info.end)
    end = info.end if length is None else min(begin + length, info.end)
    result = bytearray(end - begin)
    _fill(header.path, begin, memoryview(result))
    return bytes(result)


def read_rows(header: Header, name: str, first: int, last: int) -> torch.Tensor:
    """The rows [first, last) of a tensor of at least one dimension, in memory of their own.

    Raises:
        PeftcError: E031, as `read_tensor`.
        KeyError: the file has no tensor of that name.
    """
    import torch

    info = header.tensors[name]
    result = torch.empty((last - first, *info.shape[1:]), dtype=torch_dtype(info.dtype))
    if result.numel():
        row = info.nbytes // info.shape[0]
        _fill(header.path, info.begin + first * row, as_bytes(result))
    return result


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes."""
    import torch

    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def read_tensor(header: Header, name: str) -> torch.Tensor:
    """Read one tensor into memory of its own (no mapping: the file may be replaced afterwards).

    Raises:
        PeftcError: E031, the file cannot be read, has changed, or holds a dtype that torch lacks.
        KeyError: the file has no tensor of that name.
    """
    import torch

    info = header.tensors[name]
    result = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    if info.nbytes:
        _fill(header.path, info.begin, as_bytes(result))
    return result


def _fill(path: Path, offset: int, buffer: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    _bad(path, "the file became shorter while it was read", help="leave it alone meanwhile")
                buffer = buffer[count:]
    except OSError as error:
        fail("E031", f"{path}: cannot be read: {error.strerror or error}", help="check the disk and the permissions")


def write(
    path: str | Path,
    entries: Sequence[TensorSpec],
    produce: Produce,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a file tensor by tensor; `produce(name)` is asked for each in file order, and only one is held.

    Raises:
        ValueError: two entries of one name, or `produce` returned another dtype, shape or size than was announced.
        OSError: the disk is full, and the like; `peftc.store.atomic` turns these into E036.
    """
    ordered = in_file_order(entries)
    total, done = sum(entry.nbytes for entry in ordered), 0
    with Path(path).open("wb") as file:
        file.write(encode_header(ordered, metadata))
        for entry in ordered:
            _write_all(file, _as_bytes(entry, produce(entry.name)))
            done += entry.nbytes
            if progress is not None:
                progress(done, total)


def in_file_order(entries: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order in which the library lays tensors out. Raises `ValueError` when two have one name."""
    ordered = sorted(entries, key=lambda entry: (_RANK[entry.dtype], entry.name))
    if len({entry.name for entry in ordered}) != len(ordered):
        raise ValueError("two tensors of one name")
    return ordered


def encode_header(entries: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """A file's header, with the eight bytes before it, for tensors that follow in the order of `entries`."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _as_bytes(entry: TensorSpec, value: torch.Tensor | Buffer) -> memoryview:
    if not isinstance(value, bytes | bytearray | memoryview):
        if tuple(value.shape) != tuple(entry.shape) or dtype_code(value.dtype) != entry.dtype:
            found = f"{dtype_code(value.dtype)} {list(value.shape)}"
            raise ValueError(f"`{entry.name}` was announced as {entry.dtype} {list(entry.shape)} and came as {found}")
        value = as_bytes(value.detach().cpu().contiguous())
    view = memoryview(value).cast("B") if len(value) else memoryview(b"")
    if view.nbytes != entry.nbytes:
        raise ValueError(f"`{entry.name}` was announced with {entry.nbytes} bytes and came with {view.nbytes}")
    return view


def _write_all(file: BinaryIO, view: memoryview) -> None:
    step = 1 << 26  # a full disk is noticed, and Ctrl-C answered, within 64 MiB
    for start in range(0, view.nbytes, step):
        file.write(view[start : start + step])
