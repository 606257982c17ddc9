"""What a guess at a tensor misses, exactly and in few bytes: the distance of each element from its guess in steps of
the dtype, for the elements that differ.

    for piece in encode(true, guess):      # of one dtype and shape
        file.write(piece)
    decode(guess, file.read)               # `true`, bit for bit

An element's bits are read as a whole number that grows with its value, so neighbours are one step apart, across zero
too. A bit for each element says whether it differs; the distances of those that do follow, lowest bytes first. A
compressor makes about 1 to 5 % of a bfloat16 tensor of that where the guess is near.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from peftc.store.safetensors_io import as_bytes

if TYPE_CHECKING:
    import torch

_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def encode(true: torch.Tensor, guess: torch.Tensor) -> Iterator[bytes]:
    """The distances of `true` from `guess`, two contiguous tensors of one dtype and shape."""
    steps = _steps(true) - _steps(guess)  # wraps around, and back again in `decode`
    folded = ((steps << 1) ^ (steps >> (8 * steps.itemsize - 1))).view(_UNSIGNED[steps.itemsize])  # small ones first
    differ = folded != 0
    yield np.packbits(differ).tobytes()
    planes = folded[differ].view(np.uint8).reshape(-1, steps.itemsize)
    for plane in range(steps.itemsize):
        yield planes[:, plane].tobytes()


def decode(guess: torch.Tensor, read: Callable[[int], bytes]) -> torch.Tensor:
    """The tensor that was encoded against `guess`; `read` gives the next bytes.

    Raises `EOFError` when there are fewer than are needed.
    """
    import torch

    values = _steps(guess)
    mask = np.frombuffer(_exactly(read, (values.size + 7) // 8), np.uint8)
    differ = np.unpackbits(mask, count=values.size).astype(bool)
    count, width = int(differ.sum()), values.itemsize
    planes = np.stack([np.frombuffer(_exactly(read, count), np.uint8) for _ in range(width)], axis=1)
    folded = np.ascontiguousarray(planes).view(_UNSIGNED[width]).reshape(-1)
    one = folded.dtype.type(1)
    steps = ((folded >> one) ^ (~(folded & one) + one)).view(_SIGNED[width])
    values[differ] += steps
    bits = torch.from_numpy(_flipped(values))
    return bits.view(guess.dtype).reshape(guess.shape)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = read(size) if size else b""
    if len(data) != size:
        raise EOFError
    return data


def _steps(tensor: torch.Tensor) -> Any:
    """The bits of each element as a number that grows with it; its own inverse on bits."""
    return _flipped(np.frombuffer(as_bytes(tensor), _SIGNED[tensor.element_size()]))


def _flipped(bits: Any) -> Any:
    """All bits but the sign of negative numbers turned over."""
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)
