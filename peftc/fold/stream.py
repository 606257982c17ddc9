"""Folded tensors as bytes, a block of rows at a time, with a record of what each block changed.

The base's rows are read, hashed, folded, rounded once to the dtype they are stored in, hashed again and handed on. The
record says for every touched tensor how large the change was, and how much of it the rounding cost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peftc.fold.state import FoldedState, finite
from peftc.store.safetensors_io import Header, as_bytes, dtype_code, read_rows, read_tensor, torch_dtype

BLOCK = 1 << 19
"""Elements of a block: 2 MiB in float32, so that a block stays in a core's own cache while it is folded."""


@dataclass(frozen=True, slots=True)
class TensorChange:
    """What became of one stored tensor.

    `change` is ‖W* - W‖ (Frobenius) for the exact folded tensor W*, and `rounding` is ‖W' - W*‖ for what was stored.
    They are NaN where the shape changed or the base holds no such tensor.
    """

    name: str
    dtype: str
    sha256_before: str | None
    sha256_after: str
    change: float
    rounding: float

    @property
    def changed(self) -> bool:
        return self.sha256_before != self.sha256_after

    def to_json(self) -> dict[str, Any]:
        return {key: None if value != value else value for key, value in asdict(self).items()}


class Tally:
    """Sums over the blocks of one tensor."""

    __slots__ = ("after", "before", "change", "rounding")

    def __init__(self) -> None:
        self.before, self.after = hashlib.sha256(), hashlib.sha256()
        self.change = self.rounding = 0.0

    def round(self, name: str, before: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """`exact` in the dtype it is stored in, counted against what was stored `before`.

        Raises `PeftcError` E042 where it is not finite.
        """
        after = exact.to(before.dtype)
        if after.dtype == exact.dtype:  # one and the same tensor
            change = _square(exact - before)
        else:  # cast first: an op on two dtypes casts element by element, which takes three times as long
            self.rounding += _square(after.to(exact.dtype).sub_(exact))
            change = _square(before.to(exact.dtype).sub_(exact))
        if not math.isfinite(change):
            finite(name, after)
        self.change += change
        return after

    def result(self, name: str, dtype: str) -> TensorChange:
        norms = (math.sqrt(value) for value in (self.change, self.rounding))
        return TensorChange(name, dtype, self.before.hexdigest(), self.after.hexdigest(), *norms)


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def by_rows(
    header: Header,
    key: str,
    folded: FoldedState,
    name: str,
    done: Callable[[TensorChange], None],
    new: str | None = None,
) -> Iterator[memoryview]:
    """The folded tensor `name`, stored as `key`, in blocks of rows; `done` is told at the end, under the name `new`
    where what is written is another tensor than `key`.

    Raises `PeftcError` E031, and E042 where a block holds NaN or infinity.
    """
    info = header.tensors[key]
    step = max(1, BLOCK // max(1, info.numel // info.shape[0]))
    tally, fold = Tally(), folded.row_update(name, torch_dtype(info.dtype))
    for first in range(0, info.shape[0], step):
        stored = read_rows(header, key, first, min(first + step, info.shape[0]))
        tally.before.update(as_bytes(stored))
        block = as_bytes(tally.round(name, stored, fold(first, stored)))
        tally.after.update(block)
        yield block
    done(tally.result(new or key, info.dtype))


def whole(
    header: Header | None, key: str, exact: torch.Tensor, dtype: torch.dtype, done: Callable[[TensorChange], None]
) -> Iterator[memoryview]:
    """The same for a tensor that is there already, `exact`; without a header the base holds no `key`."""
    after = finite(key, exact.to(dtype).contiguous())
    before, tally = None, None
    if header is not None:
        stored = read_tensor(header, key)
        before = hashlib.sha256(as_bytes(stored)).hexdigest()
        if stored.shape == exact.shape:
            tally = Tally()
            tally.round(key, stored, exact.clone())
    block = as_bytes(after)
    norms = (math.nan, math.nan) if tally is None else (math.sqrt(tally.change), math.sqrt(tally.rounding))
    done(TensorChange(key, dtype_code(dtype), before, hashlib.sha256(block).hexdigest(), *norms))
    yield block
