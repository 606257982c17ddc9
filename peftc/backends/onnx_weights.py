"""The weights of an export: read, folded, cast and written a block of rows at a time, into one file beside the graph.

So a model of any size is written in the memory of its graph and of a few blocks. Several graphs (an encoder, a decoder)
may share the file: a weight that they have in common is in it once.

    weights = FoldedWeights(FoldedState(read, updates), read, constants)
    with WeightsFile(directory, "model.onnx.data", weights) as file:
        file.fill(model)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol

import torch

from peftc.diagnostics import fail
from peftc.fold.state import FoldedState, finite
from peftc.fold.stream import BLOCK
from peftc.store.safetensors_io import as_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

    from peftc.runtime.unfolded import Unfolded

_INLINE = 256
"""Bytes up to which a tensor stays in the graph's own file."""
_ALIGNMENT = 64


class Weights(Protocol):
    """Where the tensors of a program come from, by state-dict name."""

    def key(self, name: str) -> str:
        """What the tensor is called in the checkpoint; `name` itself where that holds none."""
        ...

    def blocks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The tensor in this dtype, in blocks whose bytes follow each other."""
        ...


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """Tensors in memory."""

    state: Mapping[str, torch.Tensor]

    def key(self, name: str) -> str:
        return name

    def blocks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        yield self.state[name].detach().cpu().to(dtype)


@dataclass(frozen=True, slots=True)
class FoldedWeights:
    """Tensors of a folded model from disk; `constants` are those that the fold computed. Raises `PeftcError` E031, E042
    where a tensor holds NaN or infinity that the base does not hold, or is too large for its dtype."""

    folded: FoldedState
    stored: Unfolded
    constants: Mapping[str, torch.Tensor]

    def key(self, name: str) -> str:
        return self.stored.key(name) or name

    def blocks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        touched = name in self.folded.touched
        if name in self.constants:
            yield _cast(name, self.constants[name], dtype)
        elif touched and not (shape and self.folded.by_rows(name)):
            yield _cast(name, finite(name, self.folded.exact(name)), dtype)
        elif not shape:
            yield _cast(name, self.stored(name), dtype)
        else:
            yield from self._by_rows(name, shape, dtype)

    def _by_rows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        step = max(1, BLOCK // max(1, torch.Size(shape).numel() // max(1, shape[0])))
        update = None
        for first in range(0, shape[0], step):
            block = self.stored.rows(name, first, min(first + step, shape[0]))
            if name in self.folded.touched:
                update = update or self.folded.row_update(name, block.dtype)
                block = finite(name, update(first, block))
            yield _cast(name, block, dtype)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded once. Raises `PeftcError` E042 where a finite number is none in `dtype`."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and bool((cast.isinf() & tensor.isfinite()).any()):
        fail(
            "E042",
            f"{name} holds numbers up to {float(tensor.abs().max()):.3g}, and float16 ends at 65504",
            help="export in float32: `--dtype fp32`",
        )
    return cast


@dataclass(slots=True)
class WeightsFile:
    """The one file; `progress` is told the bytes that were written and those of all graphs filled so far."""

    directory: Path
    name: str
    weights: Weights
    progress: Callable[[int, int], None] | None = None
    total: int = 0
    _file: IO[bytes] | None = None
    _places: dict[str, tuple[int, int]] = field(default_factory=dict)
    _end: int = 0

    def __enter__(self) -> WeightsFile:
        self._file = (self.directory / self.name).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        with contextlib.closing(self._file):
            self._file.flush()
        if not self._end and kind is None:
            (self.directory / self.name).unlink()  # a model so small that all of it is in the graph's file

    def fill(self, model: ir.Model, states: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Give every initializer that is one of `states` (its shape and dtype) its data and the checkpoint's name."""
        initializers = model.graph.initializers
        for name, value in list(initializers.items()):
            if name not in states:
                continue
            key = self.weights.key(name)
            if key != name and key not in initializers:
                del initializers[name]
                value.name = key
                initializers[key] = value
            value.const_value = self._tensor(name, str(value.name), *states[name])

    def _tensor(self, name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> ir.TensorProtocol:
        import onnx_ir as ir
        from onnx_ir import tensor_adapters

        if torch.Size(shape).numel() * dtype.itemsize <= _INLINE:
            whole = torch.cat([block.reshape(-1) for block in self.weights.blocks(name, shape, dtype)]).reshape(shape)
            return tensor_adapters.TorchTensor(whole, name=key)
        start, length = self._written(name, shape, dtype)
        onnx_dtype = tensor_adapters.from_torch_dtype(dtype)
        return ir.ExternalTensor(
            self.name, start, length, onnx_dtype, shape=ir.Shape(shape), name=key, base_dir=self.directory
        )

    def _written(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """Where the tensor is in the file; it is written the first time that it is asked for."""
        if name in self._places:
            return self._places[name]
        assert self._file is not None
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._file.write(bytes(start - self._end))
        self._end = start
        for block in self.weights.blocks(name, shape, dtype):
            self._end += self._file.write(as_bytes(block.contiguous()))
            if self.progress is not None:
                self.progress(self._end, max(self.total, self._end))
        self._places[name] = start, self._end - start
        return self._places[name]
