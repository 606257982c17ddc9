"""From the tensors of a call to the signature it is traced under: which axes are batch and sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftc.frontend.trace import InputSpec

_TARGET = frozenset({"decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds"})
_SEQUENCE = frozenset({
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels", "bbox",
})  # fmt: skip


def input_spec(name: str, tensor: torch.Tensor, *, encoder_decoder: bool) -> InputSpec:
    """The symbolic axes of one input of a call."""
    if tensor.dim() == 0:
        return InputSpec(tensor.dtype, ())
    target = name in _TARGET or (encoder_decoder and name == "labels" and tensor.dim() > 1)
    axis = "target" if target else "sequence"
    sizes: list[str | int] = [int(size) for size in tensor.shape]
    if sizes[0] != 1 or name not in ("position_ids", "decoder_position_ids"):
        sizes[0] = "batch"
    if tensor.dim() > 1 and (target or name in _SEQUENCE):
        sizes[1] = axis
    if tensor.dim() == 4 and name.endswith("attention_mask"):
        sizes[1:] = [int(tensor.shape[1]), axis, axis]
    return InputSpec(tensor.dtype, tuple(sizes))


def call_key(specs: Mapping[str, InputSpec], flags: Mapping[str, Any]) -> tuple[Any, ...]:
    """Calls with equal keys run the same trace."""
    return tuple(sorted(specs.items(), key=lambda item: item[0])), tuple(sorted(flags.items()))
