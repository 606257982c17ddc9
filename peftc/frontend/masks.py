"""Masks of attention by broadcasting, where transformers makes them with `torch.vmap`.

A mask is a function of four positions (row, head, query, key). Where a model adds a function of its own, transformers
maps it over each of the four in turn, and a trace keeps calls of that machinery which nothing outside of it can run.
On positions that broadcast the same functions give the same mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def masks_by_broadcasting() -> Iterator[None]:
    """For as long as the context lasts."""
    from transformers import masking_utils

    original = masking_utils._vmap_expansion_sdpa
    masking_utils._vmap_expansion_sdpa = _broadcast
    try:
        yield
    finally:
        masking_utils._vmap_expansion_sdpa = original


def _broadcast(mask: Mask) -> Mask:
    def expanded(rows: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        found = mask(rows[:, None, None, None], heads[:, None, None], queries[:, None], keys)
        return found.expand(*(positions.shape[0] for positions in (rows, heads, queries, keys)))

    return expanded
