"""The cache of a trace: keys and values of earlier tokens as inputs of the graph, the longer ones as its outputs.

A model that is traced here is given a cache of its own kind whose layers hold the graph's inputs. What it computes
with them (masks, offsets, positions) then follows from symbolic lengths, so that one graph serves the first tokens of
a text, any number of tokens after others, and a single one. Cross attention is traced as if its cache were empty: its
keys and values are outputs, at which `peftc.ir.cut` can divide the graph.

    layout = cache_layout(skeleton, default_inputs(skeleton.model))
    program = trace(skeleton, {**inputs, **past_specs(layout, skeleton.model.dtype)}, layout=layout)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.cache_utils import DynamicSlidingWindowLayer as SlidingLayer

from peftc.diagnostics import fail
from peftc.frontend.trace import UNTRACEABLE, InputSpec, Skeleton, quiet, sample

SEEN = "past_seen"
"""An input of no elements, [tokens seen, 0]: a layer with a sliding window holds fewer rows than that."""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What one layer keeps of each token: [heads, width] keys and values, of the last `window` - 1 tokens if not 0."""

    heads: int
    key_width: int
    value_width: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a model's cache holds; a layer that keeps nothing is None. `cross`: there is one for cross attention."""

    layers: tuple[LayerLayout | None, ...]
    cross: bool = False

    @property
    def slides(self) -> bool:
        return any(layer is not None and layer.window for layer in self.layers)


def past_names(index: int) -> tuple[str, str]:
    """The graph's inputs for one layer."""
    return f"past_{index}_keys", f"past_{index}_values"


def past_specs(layout: CacheLayout, dtype: torch.dtype) -> dict[str, InputSpec]:
    """The inputs that a cache of this layout is to the graph."""
    specs: dict[str, InputSpec] = {}
    for index, layer in enumerate(layout.layers):
        if layer is not None:
            rows = "window" if layer.window else "past"
            for name, width in zip(past_names(index), (layer.key_width, layer.value_width), strict=True):
                specs[name] = InputSpec(dtype, ("batch", layer.heads, rows, width))
    if layout.slides:
        specs[SEEN] = InputSpec(torch.long, ("past", 0))
    return specs


def cache_layout(skeleton: Skeleton, inputs: Mapping[str, InputSpec]) -> CacheLayout:
    """What the model keeps when it is asked to, learned by running it without weights.

    Raises `PeftcError` E041 for a model that keeps nothing, or something else than keys and values.
    """
    cache = _filled_cache(skeleton, {name: sample(spec) for name, spec in inputs.items()})
    if isinstance(cache, EncoderDecoderCache):
        own: Any = cache.self_attention_cache
        other: Any = cache.cross_attention_cache
        holds = any(getattr(layer, "keys", None) is not None for layer in other.layers)
        return CacheLayout(_layers(skeleton, own), cross=holds)  # a decoder by itself attends to no encoder
    if not isinstance(cache, Cache):
        _refuse(skeleton, "it returns none" if cache is None else f"it keeps a {type(cache).__name__}")
    return CacheLayout(_layers(skeleton, cache))  # pyright: ignore[reportArgumentType]


def _filled_cache(skeleton: Skeleton, tensors: dict[str, torch.Tensor]) -> Any:
    """The cache that the model returns of these tokens; some models read the mask, which has no values here."""
    unmasked = {name: tensor for name, tensor in tensors.items() if name != "attention_mask"}
    reasons = []
    for given in (tensors, unmasked):
        with torch.no_grad(), quiet(), _spelled_out(skeleton.model):
            try:
                return getattr(skeleton.model(**given, use_cache=True), "past_key_values", None)
            except UNTRACEABLE as error:
                reasons.append((str(error).splitlines() or [type(error).__name__])[0])
    _refuse(skeleton, f"it does not run with one: {reasons[-1]}")


@contextlib.contextmanager
def _spelled_out(model: Any) -> Iterator[None]:
    """Eager attention: for fused ones transformers reads values of masks, and on the meta device there are none.

    Experts as one batched product: for grouped ones the meta device takes bfloat16 alone.
    """
    before, experts = model.config._attn_implementation, _experts(model)
    model.set_attn_implementation("eager")
    for config, _ in experts:
        config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for config, implementation in reversed(experts):
            config._experts_implementation_internal = implementation


def _experts(model: Any) -> list[tuple[Any, str]]:
    """The configs of `model` and the models inside it, and how each of them runs its experts."""
    parts = [part for part in model.modules() if getattr(part, "_can_set_experts_implementation", lambda: False)()]
    return [(part.config, part.config._experts_implementation_internal) for part in parts]


def _layers(skeleton: Skeleton, cache: Cache) -> tuple[LayerLayout | None, ...]:
    found: list[LayerLayout | None] = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, SlidingLayer, DummyLayer):
            _refuse(skeleton, f"a layer of it is a {type(layer).__name__}, which holds more than keys and values")
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            found.append(None)
            continue
        window = layer.sliding_window if isinstance(layer, SlidingLayer) else 0
        found.append(LayerLayout(int(keys.shape[1]), int(keys.shape[-1]), int(values.shape[-1]), int(window)))
    if not any(found):
        _refuse(skeleton, "it holds nothing")
    return tuple(found)


def _refuse(skeleton: Skeleton, reason: str) -> Any:
    fail(
        "E041",
        f"an adapted {type(skeleton.model).__name__} keeps no cache: {reason}",
        help="leave the cache out: `generate(use_cache=False)` computes every token from the whole text",
    )


class _Full(DynamicLayer):
    """A layer of the traced cache. `hidden` tokens came before the rows that it holds."""

    keys: Any
    values: Any

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: Any) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self.hidden = seen - keys.shape[-2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.hidden + self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        return self.keys.shape[-2] + query_length, self.hidden


class _Sliding(_Full):
    is_sliding = True


class _Cross(DynamicLayer):
    """Cross attention's layer: it keeps what it is given, and is empty before."""

    keys: Any
    values: Any

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> Any:
        return self.keys.shape[-2] if self.is_initialized else 0


def traced_cache(layout: CacheLayout, past: Mapping[str, torch.Tensor]) -> Any:
    """The cache that the model is traced with, made of the graph's inputs."""
    layers: list[Any] = []
    for index, layer in enumerate(layout.layers):
        if layer is None:
            layers.append(DummyLayer())
            continue
        keys, values = (past[name] for name in past_names(index))
        seen = past[SEEN].shape[0] if layer.window else keys.shape[-2]
        layers.append((_Sliding if layer.window else _Full)(keys, values, seen))
    cache = DynamicCache()
    cache.layers = layers
    if not layout.cross:
        return cache
    crossed = DynamicCache()
    crossed.layers = [_Cross() for _ in layers]  # pyright: ignore[reportAttributeAccessIssue]
    both = EncoderDecoderCache(cache, crossed)
    both.is_updated = dict.fromkeys(range(len(layers)), False)
    return both


def kept(cache: Any) -> tuple[tuple[torch.Tensor | None, ...], ...]:
    """What the traced cache holds after the call, layer by layer: keys, values, and those of cross attention."""
    if isinstance(cache, EncoderDecoderCache):
        own: Any = cache.self_attention_cache
        other: Any = cache.cross_attention_cache
        if not other.layers:
            return kept(own)
        pairs = zip(own.layers, other.layers, strict=True)
        return tuple((one.keys, one.values, cross.keys, cross.values) for one, cross in pairs)
    return tuple((layer.keys, layer.values) for layer in cache.layers)
