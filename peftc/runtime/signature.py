"""Calls: which arguments are tensors, which are fixed in the trace, and which axes are batch and sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from peftc.diagnostics import fail
from peftc.frontend.trace import InputSpec

_TARGET = frozenset({"decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds"})
_SEQUENCE = frozenset({
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox", "seq_idx",
})  # fmt: skip
_COUNTED: Final = {"pixel_values": "images", "image_": "images", "input_features": "sounds", "input_values": "sounds"}
_FROM_CONFIG: Final = ("output_hidden_states", "output_attentions")
_FOR_FLASH: Final = ("max_length_q", "max_length_k")
_PLAIN: Final = (bool, int, float, str)
_SIGNATURES: Final[dict[Callable[..., Any], inspect.Signature]] = {}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a model: `tensors` are the graph's inputs, `flags` are fixed in the trace."""

    tensors: dict[str, torch.Tensor]
    flags: dict[str, Any]
    as_tuple: bool
    cached: bool = False
    """Whether it has a cache, or is to make one."""
    cache: Any = None
    encoded: Any = None
    """What the encoder has said already, as its output class."""


def read_call(forward: Callable[..., Any], config: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The call `forward(*args, **kwargs)`, where `forward` is the base's own method and `config` its config.

    Raises `PeftcError` E041 for what a trace cannot take, `TypeError` for arguments that `forward` does not have.
    """
    signature = _signature(forward)
    given = dict(signature.bind(None, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)))
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    given.update(given.pop(rest, {}))
    given = {name: value for name, value in given.items() if value is not None and not _holds_nothing(value)}
    as_tuple = not given.pop("return_dict", getattr(config, "return_dict", True))
    cache, encoded = given.pop("past_key_values", None), _encoded(given.pop("encoder_outputs", None))
    cached = bool(given.pop("use_cache", False)) or cache is not None
    if "cache_params" in given:
        fail("E041", "an adapted model takes no `cache_params`", help="leave it out: `generate` does without by itself")
    if isinstance(given.get("num_items_in_batch"), int):
        given["num_items_in_batch"] = torch.tensor(given["num_items_in_batch"])  # else every count were a new trace
    if not str(getattr(config, "_attn_implementation", "")).startswith("flash"):
        for name in _FOR_FLASH:  # nothing else reads the longest sample of a packed batch; each were a new trace
            given.pop(name, None)
    for name in _FROM_CONFIG:
        given.setdefault(name, bool(getattr(config, name, False)))
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    flags = {n: v for n, v in given.items() if n not in tensors and v is not defaults.get(n, False)}
    flags = {n: v for n, v in flags.items() if v is not False or defaults.get(n)}
    for name, value in flags.items():
        if not isinstance(value, _PLAIN):
            fail("E041", f"an adapted model takes no {type(value).__name__} as `{name}`", help="give tensors")
    return Call(tensors, flags, as_tuple, cached, cache, encoded)


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Kept by hand: torch.compile traces through what `functools.cache` wraps, and warns of it."""
    if forward not in _SIGNATURES:
        _SIGNATURES[forward] = inspect.signature(forward)
    return _SIGNATURES[forward]


def _holds_nothing(value: Any) -> bool:
    """An empty dictionary, which `generate` gives for what a model of several towers could have been given."""
    return isinstance(value, dict) and not value


def _encoded(given: Any) -> Any:
    """What was given as `encoder_outputs`, which may be a tuple, as an output class."""
    if given is None or hasattr(given, "last_hidden_state"):
        return given
    from transformers.modeling_outputs import BaseModelOutput

    if not isinstance(given, (tuple, list)) or not given:
        fail("E041", f"an adapted model takes no {type(given).__name__} as `encoder_outputs`", help="give a tuple")
    return BaseModelOutput(*given[:3])


def call_specs(tensors: Mapping[str, torch.Tensor], model: Any) -> dict[str, InputSpec]:
    """The inputs of a call of `model`. Where a text may hold no image or several, images are counted by themselves."""
    seq2seq = bool(model.config.is_encoder_decoder)
    specs = {name: input_spec(name, tensor, encoder_decoder=seq2seq) for name, tensor in tensors.items()}
    if not model.can_generate() or seq2seq or specs.keys().isdisjoint(("input_ids", "inputs_embeds")):
        return specs
    for name, spec in specs.items():
        axis = next((axis for start, axis in _COUNTED.items() if name.startswith(start)), None)
        if axis is not None and spec.sizes[:1] == ("batch",):
            specs[name] = replace(spec, sizes=(axis, *spec.sizes[1:]))
    return specs


def input_spec(name: str, tensor: torch.Tensor, *, encoder_decoder: bool) -> InputSpec:
    """The symbolic axes of one input of a call."""
    if tensor.dim() == 0:
        return InputSpec(tensor.dtype, ())
    sizes: list[str | int] = [int(size) for size in tensor.shape]
    if sizes[0] != 1 or name not in ("position_ids", "decoder_position_ids"):
        sizes[0] = "batch"
    if tensor.dim() > 1 and name == "labels" and not tensor.is_floating_point():
        sizes[1] = "target" if encoder_decoder else "sequence"  # floats are one number a class, not a token
    elif tensor.dim() == 4 and name.endswith("attention_mask"):
        axis = "target" if name in _TARGET else "sequence"
        sizes[1:] = [size if size == 1 else axis if at > 1 else size for at, size in enumerate(sizes) if at > 0]
    elif tensor.dim() == 3 and name == "position_ids":  # of time, height and width each
        sizes = [int(tensor.shape[0]), "batch", "sequence"]
    elif tensor.dim() > 1 and (name in _TARGET or name in _SEQUENCE):
        sizes[1] = "target" if name in _TARGET else "sequence"
    return InputSpec(tensor.dtype, tuple(sizes))


def call_key(specs: Mapping[str, InputSpec], flags: Mapping[str, Any]) -> tuple[Any, ...]:
    """Calls with equal keys run the same trace."""
    return tuple(sorted(specs.items(), key=lambda item: item[0])), tuple(sorted(flags.items()))
