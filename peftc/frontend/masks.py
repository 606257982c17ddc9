"""Masks of attention by broadcasting, where transformers makes them with `torch.vmap`.

A mask is a function of four positions (row, head, query, key). Where a model adds a function of its own, transformers
maps it over each of the four in turn, and a trace keeps calls of that machinery which nothing outside of it can run.
On positions that broadcast the same functions give the same mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def masks_by_broadcasting() -> Iterator[None]:
    """For as long as the context lasts."""
    from transformers import masking_utils

    names: dict[str, Any] = {
        "_vmap_expansion_sdpa": _broadcast,
        "TransformGetItemToIndex": contextlib.nullcontext,  # indexing inside vmap, by an op that no graph runs
    }
    originals = {name: getattr(masking_utils, name) for name in names if hasattr(masking_utils, name)}
    for name in originals:
        setattr(masking_utils, name, names[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(masking_utils, name, original)


def _broadcast(mask: Mask) -> Mask:
    def expanded(rows: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        found = mask(rows[:, None, None, None], heads[:, None, None], queries[:, None], keys)
        return found.expand(*(positions.shape[0] for positions in (rows, heads, queries, keys)))

    return expanded
