"""A caller's cache: read into the graph's inputs, and written with what the graph computed.

The object stays the caller's own, of its own class, and holds what its base would have put there: so reordering,
cropping and repeating it between steps mean what they always mean. Prefixes of deltas are no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from peftc.diagnostics import fail
from peftc.frontend.cache import SEEN, CacheLayout, LayerLayout, past_names

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, DummyLayer)


def new_cache(config: Any, layout: CacheLayout) -> Cache:
    """An empty cache, as the base would make one."""
    text = config.get_text_config(decoder=True)
    if layout.cross:
        return EncoderDecoderCache(DynamicCache(config=text), DynamicCache(config=text))
    return DynamicCache(config=text)


def check_cache(cache: Any, layout: CacheLayout) -> None:
    """Raise `PeftcError` E041 for a cache that cannot be read."""
    if not isinstance(cache, Cache):
        _refuse(f"takes no {type(cache).__name__} as `past_key_values`", "give a Cache of transformers")
    if isinstance(cache, EncoderDecoderCache) != layout.cross:
        wanted = "EncoderDecoderCache" if layout.cross else "DynamicCache or StaticCache"
        _refuse(f"takes no {type(cache).__name__} as `past_key_values`", f"give a {wanted}")
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if layout.cross else (cache,):  # pyright: ignore[reportAttributeAccessIssue]
        odd = next((layer for layer in part.layers if type(layer) not in _LAYERS), None)
        if odd is not None:
            _refuse(f"reads no {type(odd).__name__} of a cache", "use a dynamic or a static cache")
        if part.offloading:
            refuse_offloaded()


def refuse_offloaded() -> NoReturn:
    """Raise `PeftcError` E041 for a cache that moves its rows between devices."""
    _refuse("reads no offloaded cache", 'leave `cache_implementation="offloaded"` out')


def _refuse(what: str, help: str) -> NoReturn:
    fail("E041", f"an adapted model {what}", help=help)


def own_part(cache: Any) -> Cache:
    """The part of a cache that grows with every token: self attention's."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def tokens_seen(cache: Any, layout: CacheLayout) -> int:
    """How many tokens the cache has been given."""
    holder = next(index for index, layer in enumerate(layout.layers) if layer is not None)
    layers = own_part(cache).layers
    return int(layers[holder].get_seq_length()) if holder < len(layers) else 0  # pyright: ignore[reportAttributeAccessIssue]


def past_of(
    cache: Any, layout: CacheLayout, batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The graph's inputs: of each layer the rows that it still needs."""
    layers, seen = own_part(cache).layers, tokens_seen(cache, layout)
    past: dict[str, torch.Tensor] = {}
    for index, shape in enumerate(layout.layers):
        if shape is not None:
            layer = layers[index] if index < len(layers) else None
            rows = _rows(layer, shape, seen)
            if rows is None:
                sizes = ((batch, shape.heads, 0, width) for width in (shape.key_width, shape.value_width))
                rows = tuple(torch.empty(size, dtype=dtype, device=device) for size in sizes)
            past.update(zip(past_names(index), rows, strict=True))
    if layout.slides:
        past[SEEN] = torch.empty((seen, 0), dtype=torch.long, device=device)
    return past


def _rows(layer: Any, shape: LayerLayout, seen: int) -> tuple[torch.Tensor, ...] | None:
    """Keys and values of the tokens that a layer still sees; None for a layer that has seen none."""
    if layer is None or not layer.is_initialized or not seen:
        return None
    keys, values = layer.keys, layer.values
    if isinstance(layer, StaticLayer):
        keys, values = keys[:, :, :seen], values[:, :, :seen]
    if shape.window:
        keys, values = (part[:, :, max(0, part.shape[2] - shape.window + 1) :] for part in (keys, values))
    return keys, values


def keep(cache: Any, layout: CacheLayout, rows: Sequence[tuple[Any, ...]], new: int) -> None:
    """Put into the cache what the graph returned: all rows of each layer, of which the last `new` are new ones."""
    own = own_part(cache)
    for index, shape in enumerate(layout.layers):
        if shape is None:
            continue
        while len(own.layers) <= index:
            own.layers.append(DynamicLayer())
        _keep_rows(own.layers[index], rows[index][0], rows[index][1], new)
        if layout.cross and not cache.is_updated.get(index):
            _keep_crossed(cache, index, rows[index][2], rows[index][3])


def _keep_rows(layer: Any, keys: torch.Tensor, values: torch.Tensor, new: int) -> None:
    if type(layer) is DynamicLayer:
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values  # all of them: it held the others
        return
    first = keys.shape[2] - new
    if (
        isinstance(layer, StaticLayer)
        and not layer.is_sliding
        and int(layer.get_seq_length()) + new > layer.max_cache_len
    ):
        _refuse(
            f"cannot put {new} more tokens into a static cache of {layer.max_cache_len} that holds "
            f"{int(layer.get_seq_length())}",
            "make the cache longer",
        )
    layer.update(keys[:, :, first:], values[:, :, first:])


def _keep_crossed(cache: EncoderDecoderCache, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    layers = cache.cross_attention_cache.layers
    while len(layers) <= index:
        layers.append(DynamicLayer())
    layers[index].update(keys, values)  # pyright: ignore[reportAttributeAccessIssue]
    cache.is_updated[index] = True


def crossed(cache: Any, layout: CacheLayout) -> dict[str, torch.Tensor] | None:
    """Keys and values of cross attention by name of the graph's inputs; None where they are still to be computed."""
    if not layout.cross or not all(cache.is_updated.get(i) for i, shape in enumerate(layout.layers) if shape):
        return None
    layers = cache.cross_attention_cache.layers
    found: dict[str, torch.Tensor] = {}
    for index, shape in enumerate(layout.layers):
        if shape is not None:
            found.update(zip(crossed_names(index), (layers[index].keys, layers[index].values), strict=True))
    return found


def crossed_names(index: int) -> tuple[str, str]:
    """The inputs for one layer's cross attention of a graph that does not compute it."""
    return f"crossed_{index}_keys", f"crossed_{index}_values"
