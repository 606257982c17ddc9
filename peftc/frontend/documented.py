"""The arguments of a model's forward as its own documentation tells them: dtype, shape, and whether they may be left
out.

    documented(LxmertModel)["visual_feats"].dims    # ("batch_size", "num_visual_features", "visual_feat_dim")

transformers writes a line for each: "bbox (`torch.LongTensor` of shape `(batch_size, sequence_length, 4)`,
*optional*):". A size that such a line names is looked up in the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_LINE = re.compile(
    r"^\s*(?P<name>\w+) \([`']*(?P<type>[\w.\[\], |]*?)[`']* of shape [`']*[(\[](?P<dims>.*?)[)\]][`']*(?P<rest>.*)\):"
)
_DTYPES = {
    "LongTensor": torch.long, "IntTensor": torch.long, "int": torch.long, "BoolTensor": torch.bool, "bool": torch.bool,
}  # fmt: skip
_BATCH = re.compile(r"bs|batch(_size)?|num_(images|videos)")
_SEQUENCE = re.compile(r"(seq|sequence)_len(gth)?|num_boxes|num_tokens")
_TARGET = re.compile(r"target_(sequence|seq)_len(gth)?")
_LONG = re.compile(r"(_ids|^ids|labels|mask|timesteps|_pos|freq|shapes|sizes)$")
"""Names of arguments with whole numbers, where the documentation says no more than `Tensor`."""
UNKNOWN = 5
"""A size that nothing tells: of a list of things that is as long as the caller likes."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One tensor that a forward takes."""

    dtype: torch.dtype | None
    """None: that of the weights."""
    dims: tuple[str, ...]
    optional: bool


def documented(cls: type) -> dict[str, Argument]:
    """Every tensor argument that the documentation of the class's forward gives a shape."""
    text = (getattr(cls.forward, "__doc__", None) or "").partition("Returns:")[0]
    found: dict[str, Argument] = {}
    for match in filter(None, map(_LINE.match, text.splitlines())):
        name, kind = match["name"], match["type"].rpartition(".")[2]
        dims = tuple(dim.strip() for dim in match["dims"].split(",") if dim.strip())
        dtype = _DTYPES.get(kind, torch.long if kind == "Tensor" and _LONG.search(name) else None)
        found.setdefault(name, Argument(dtype, dims, "optional" in match["rest"]))
    return found


def sizes(argument: Argument, name: str, config: Any) -> tuple[str | int, ...]:
    """Symbolic axes for batch and sequences, numbers for what the config says."""
    window = _window(config) if name.startswith("past_") else None
    found = tuple(_size(dim, config) for dim in argument.dims)
    if found[:1] == (UNKNOWN,) and name == "bbox":  # "({0}, 4)": the place of a shape that was never filled in
        return ("batch", "sequence", *found[1:])
    return tuple(window if size == "sequence" and window else size for size in found)


def _window(config: Any) -> int | None:
    """How many steps of the past a model of time series reads."""
    steps, lags = getattr(config, "context_length", None), getattr(config, "lags_sequence", None)
    return steps + max(lags, default=0) if steps and lags else steps


def _size(dim: str, config: Any) -> str | int:
    for pattern, axis in ((_BATCH, "batch"), (_TARGET, "target"), (_SEQUENCE, "sequence")):
        if pattern.fullmatch(dim):
            return axis
    if dim.isdigit():
        return int(dim)
    wanted = _ALIASES.get(dim, (dim.removeprefix("config."),))
    values = (getattr(c, name, None) for c in configs(config) for name in wanted)
    return next((value for value in values if type(value) is int), UNKNOWN)


_ALIASES = {
    "height": ("image_size",),
    "width": ("image_size",),
    "frame_size": ("image_size", "crop_size"),
    "num_frames": ("num_frames", "frames_per_clip"),
    "num_channels": ("num_channels", "in_chans", "in_channels"),
    "num_features": ("num_time_features",),
}


def configs(config: Any) -> Iterator[Any]:
    """A config and those inside it, the outer ones first."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from configs(value)
