"""The inputs that people call a model with, from its class and config: ids and mask, pixels, features.

default_inputs(model)["input_ids"].sizes        # ("batch", "sequence")
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftc.frontend.documented import Argument, documented, sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor input: `sizes` holds names of symbolic axes ("batch", "sequence", "target", ...) or ints."""

    dtype: torch.dtype
    sizes: tuple[str | int, ...]


IDS = InputSpec(torch.long, ("batch", "sequence"))


def default_inputs(model: PreTrainedModel) -> dict[str, InputSpec]:
    """Ids and mask of a model that reads text, what the others read; an image beside text where it has to be given.

    A model that generates from text, and may look at an image or a sound, is called with text alone.
    """
    accepted = forward_arguments(type(model))
    main = model.main_input_name if model.main_input_name in accepted else _first_of(accepted)
    told = documented(type(model))
    inputs: dict[str, InputSpec] = {}
    if main == "input_ids":
        if "input_ids" in accepted:
            inputs["input_ids"] = IDS
        if {"input_ids", "attention_mask"} <= {*accepted}:
            inputs["attention_mask"] = IDS
    elif main in _SHAPES:
        shape = _SHAPES[main](model, model.config)
        pair = main == "pixel_values" and main in told and told[main].dims[1:2] == ("2",)
        inputs[main] = InputSpec(model.dtype, ("batch", 2, *shape) if pair else ("batch", *shape))
    elif main == "inputs_embeds":
        inputs[main] = InputSpec(model.dtype, ("batch", "sequence", _width(model.config)))
    inputs.update(_beside(model, accepted, main))
    inputs.update(_asked_for(model, told, inputs))
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = InputSpec(torch.long, ("batch", "target"))
    return inputs


def forward_arguments(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)


def _first_of(accepted: tuple[str, ...]) -> str:
    """What is read by a model whose `main_input_name` its forward does not take."""
    known = ("input_ids", *_SHAPES, "inputs_embeds")
    return next((name for name in accepted if name in known), "input_ids")


def _beside(model: PreTrainedModel, accepted: tuple[str, ...], main: str) -> dict[str, InputSpec]:
    """The second input of a model of two towers, and what a forward takes without a default."""
    found: dict[str, InputSpec] = {}
    signature = inspect.signature(type(model).forward).parameters
    for name, tower in (("pixel_values", "vision_config"), ("input_features", "audio_config")):
        config = getattr(model.config, tower, None)
        if config is None and name == "pixel_values" and hasattr(model.config, "image_size"):
            config = model.config  # one tower that reads text and an image
        required = name in accepted and signature[name].default is inspect.Parameter.empty
        if name in accepted and name != main and config is not None and (required or not model.can_generate()):
            found[name] = InputSpec(model.dtype, ("batch", *_SHAPES[name](model, config)))
    if "input_ids" in accepted and main != "input_ids":
        required = signature["input_ids"].default is inspect.Parameter.empty
        if required or (hasattr(model.config, "text_config") and not model.config.is_encoder_decoder):
            found["input_ids"] = IDS
    return found


def _asked_for(
    model: PreTrainedModel, told: Mapping[str, Argument], known: Mapping[str, InputSpec]
) -> dict[str, InputSpec]:
    """What else has to be given: arguments without a default, and those that the documentation calls not optional.

    Where a model reads text or an image, only the places of its words count among the latter: what such a
    documentation calls needed is often one of several ways.
    """
    found: dict[str, InputSpec] = {}
    for name, parameter in inspect.signature(type(model).forward).parameters.items():
        if name in {*known, *_LABELS, "self"} or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            continue
        required = parameter.default is inspect.Parameter.empty
        argument = told.get(name)
        needed = argument is not None and not argument.optional and (name in _PLACES or not known)
        if name == "bbox" and model.config.is_encoder_decoder:  # its bias over places has no default, as an encoder's
            needed = True
        if name == "input_features_mask" and name[:-5] in known and (required or needed or argument is not None):
            found[name] = InputSpec(torch.long, ("batch", _frames(model, known[name[:-5]])))
        elif argument is not None and (required or needed):
            dtype = model.dtype if name in _PLACES else argument.dtype or model.dtype
            found[name] = InputSpec(dtype, sizes(argument, name, model.config))
        elif required and name.endswith("_embeds"):
            found[name] = InputSpec(model.dtype, ("batch", "sequence", _width(model.config)))
    return found


_LABELS = ("labels", "future_values")
_PLACES = ("bbox", "visual_feats", "visual_pos")
"""Where words stand on a page, and what regions of an image show: parts of the page, so no whole numbers."""


def _frames(model: PreTrainedModel, features: InputSpec) -> str | int:
    """The axis of time of a spectrogram."""
    mel = getattr(model.config, "num_mel_bins", None)
    return features.sizes[2] if features.sizes[1] == mel else features.sizes[1]


def _width(config: Any) -> int:
    return int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0))


def _image_shape(_: PreTrainedModel, config: Any) -> tuple[int, ...]:
    tower = getattr(config, "vision_config", None)
    config = config if hasattr(config, "image_size") or tower is None else tower
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (getattr(config, "num_channels", 3), int(height), int(width))
    frames = getattr(config, "num_frames", None)
    return shape if frames is None else (int(frames), *shape)


def _feature_shape(model: PreTrainedModel, config: Any) -> tuple[int, ...]:
    """Frames of a spectrogram: [mel, frames] where a convolution over time reads them, [frames, mel] elsewhere."""
    if hasattr(config, "input_feat_per_channel"):
        return (64, config.input_feat_per_channel * getattr(config, "input_channels", 1))
    if hasattr(config, "feature_projection_input_dim"):
        return (64, config.feature_projection_input_dim)
    tower = next(
        (c for c in (getattr(config, n, None) for n in ("encoder_config", "audio_config")) if c is not None), config
    )
    mel = next(
        (int(getattr(c, n)) for c in (config, tower) for n in ("num_mel_bins", "feature_size") if hasattr(c, n)), 80
    )
    over_time = any(isinstance(m, torch.nn.Conv1d) and m.in_channels == mel for m in model.modules())
    frames = 2 * getattr(config, "max_source_positions", 1500)
    return (mel, frames) if over_time else (128, mel)


def _wave_shape(model: PreTrainedModel, config: Any) -> tuple[int, ...]:
    """A wave of sound; a spectrogram where the model cuts patches of one (AST)."""
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return (config.max_length, config.num_mel_bins)
    if getattr(config, "audio_channels", None):
        return (config.audio_channels, 4000)
    return (4000,)


_SHAPES = {"pixel_values": _image_shape, "input_features": _feature_shape, "input_values": _wave_shape}
