"""The best low-rank parts of a matrix that is read in blocks of rows: a truncated singular value decomposition.

A small matrix is decomposed whole, in float64. Of a large one neither the matrix nor its square ever stands in memory:
its range is found by a random sketch with two power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4), every
product summed in float64. What is written off is not estimated: for the projection that a sketch is, the squared norm
of the matrix less the squares of the singular values kept is the squared error.

    found = decompose(matrix, 16)
    found.left @ found.right            # the nearest matrix of rank 16, or nearly so
    found.error(16)                     # ‖M - left right‖ / ‖M‖
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

EXACT = 1 << 21
"""Elements up to which a matrix is decomposed whole."""
_OVERSAMPLE, _POWERS, _FIRST = 10, 2, 32

Blocks = Callable[[], Iterator[tuple[int, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of this shape; `blocks` gives the number of the first row and the rows, in float64, every time anew."""

    shape: tuple[int, int]
    blocks: Blocks

    def times(self, right: torch.Tensor) -> torch.Tensor:
        result = right.new_empty(self.shape[0], right.shape[1])
        for first, rows in self.blocks():
            torch.mm(rows, right, out=result[first : first + rows.shape[0]])
        return result

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        result = left.new_zeros(self.shape[1], left.shape[1])
        for first, rows in self.blocks():
            result.addmm_(rows.t(), left[first : first + rows.shape[0]])
        return result

    def norm(self) -> float:
        return math.sqrt(sum(float(torch.linalg.vector_norm(rows)) ** 2 for _, rows in self.blocks()))

    def error(self, left: torch.Tensor, right: torch.Tensor) -> float:
        """‖M - left right‖, measured."""
        parts = ((rows - left[first : first + rows.shape[0]] @ right) for first, rows in self.blocks())
        return math.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts))


@dataclass(frozen=True, slots=True)
class LowRank:
    """`left` [n, r] and `right` [r, m] in float64, the singular values shared out evenly; `values` are all that were
    found, in falling order."""

    left: torch.Tensor
    right: torch.Tensor
    values: tuple[float, ...]
    norm: float
    exact: bool

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def error(self, rank: int) -> float:
        """The share of the norm that the first `rank` directions miss."""
        return missed(self.values, self.norm, rank)

    def cut(self, rank: int) -> LowRank:
        return LowRank(self.left[:, :rank], self.right[:rank], self.values, self.norm, self.exact)


def missed(values: tuple[float, ...], norm: float, rank: int) -> float:
    """‖M - M_r‖ / ‖M‖ for the first singular values and the norm of M."""
    if norm == 0:
        return 0.0
    # From the far end where all values are known: a difference of large squares would lose what is small.
    tail = math.fsum(value**2 for value in values[rank:])
    rest = norm**2 - math.fsum(value**2 for value in values)
    return math.sqrt(tail + (rest if rest > 1e-12 * norm**2 else 0.0)) / norm


def decompose(matrix: Matrix, rank: int) -> LowRank:
    """The low-rank part of `rank`, or of the smaller side where that is less."""
    rank = min(rank, *matrix.shape)
    return _whole(matrix, rank) if _is_small(matrix, rank) else _sketched(matrix, rank)


def decompose_within(matrix: Matrix, error: float, most: int) -> LowRank | None:
    """The low-rank part of the least rank that misses no more than `error` of the norm; None where that is over `most`.

    A sketch is widened until it holds enough.
    """
    most, tried = min(most, *matrix.shape), _FIRST
    while True:
        tried = most if _is_small(matrix, tried) else min(tried, most)
        found = decompose(matrix, tried)
        enough = next((rank for rank in range(1, tried + 1) if found.error(rank) <= error), None)
        if enough is not None or tried == most:
            return None if enough is None else found.cut(enough)
        tried *= 2


def _is_small(matrix: Matrix, rank: int) -> bool:
    """Whether it is decomposed whole: it is small, or a sketch would be as large."""
    return math.prod(matrix.shape) <= EXACT or 2 * (rank + _OVERSAMPLE) >= min(matrix.shape)


def _whole(matrix: Matrix, rank: int) -> LowRank:
    dense = torch.empty(matrix.shape, dtype=torch.float64)
    for first, rows in matrix.blocks():
        dense[first : first + rows.shape[0]] = rows
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return _shared_out(u, s, vt, rank, float(torch.linalg.vector_norm(dense)), exact=True)


def _sketched(matrix: Matrix, rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(matrix.shape[1], rank + _OVERSAMPLE, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix.times(sketch)).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix.times(torch.linalg.qr(matrix.transposed_times(basis)).Q)).Q
    u, s, vt = torch.linalg.svd(matrix.transposed_times(basis).t(), full_matrices=False)
    return _shared_out(basis @ u, s, vt, rank, matrix.norm(), exact=False)


def _shared_out(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, rank: int, norm: float, *, exact: bool) -> LowRank:
    root = s[:rank].sqrt()
    return LowRank(u[:, :rank] * root, root[:, None] * vt[:rank], tuple(s.tolist()), norm, exact)
