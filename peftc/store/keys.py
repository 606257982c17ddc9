"""Which stored tensor is which parameter: the names of a checkpoint against the names of a model's state dict.

A checkpoint may hold a model with another head, or names of an older day; transformers renames while it loads. Here
the same renames are worked out from names alone, so that weights can be read, and later written back, one by one.
Where transformers computes tensors while loading (experts stacked into one tensor, say), names have no counterpart;
those are listed apart.

    names = key_map(model, base.shapes())       # a bert checkpoint, a model with a new head
    names.state_to_checkpoint["bert.embeddings.word_embeddings.weight"]   # "embeddings.word_embeddings.weight"
    names.missing                                # ["classifier.weight", "classifier.bias"]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A tensor that transformers computes from `sources` while loading, by `operations` in order."""

    operations: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def reason(self) -> str:
        first, *rest = self.sources
        return f"{', '.join(self.operations)} of {first}" + (f" and {len(rest)} more" if rest else "")


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Every name of the state dict is in exactly one of `state_to_checkpoint`, `tied`, `missing`, `converted` and
    `mismatched`; every name of the checkpoint is a value of the first, a source of `converted`, the counterpart of
    `mismatched`, in `unexpected` or in `ignored`."""

    state_to_checkpoint: dict[str, str] = field(default_factory=dict)
    """State-dict name -> checkpoint name of the same tensor, unchanged."""
    tied: dict[str, str] = field(default_factory=dict)
    """Name without a tensor of its own -> state-dict name of the parameter that it shares."""
    missing: list[str] = field(default_factory=list)
    """State-dict names for which the checkpoint has nothing: a new head, or a buffer of a newer version."""
    converted: dict[str, Conversion] = field(default_factory=dict)
    """State-dict name -> how transformers computes it; not a plain rename."""
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """State-dict name -> shape stored and shape wanted, where they differ (a head with other labels)."""
    unexpected: list[str] = field(default_factory=list)
    """Checkpoint names that the model has no use for."""
    ignored: list[str] = field(default_factory=list)
    """Checkpoint names that the model type is known to leave unread, such as `position_ids`."""
    stored_twice: dict[str, str] = field(default_factory=dict)
    """Name -> name it is tied to, where the checkpoint stores both. transformers ties them only if they are equal."""


def key_map(model: PreTrainedModel, checkpoint: Iterable[str] | Mapping[str, Sequence[int]]) -> KeyMap:
    """Match a checkpoint's names to the state dict of `model`, as `from_pretrained` would.

    `model` may be on the meta device; its tensors are not read. With a mapping of names to shapes, tensors of another
    shape than the model's are told apart.
    """
    state = model.state_dict()
    plain, converted, unexpected = _rename_all(model, state, checkpoint)
    mismatched = _mismatched(state, plain, checkpoint) if isinstance(checkpoint, Mapping) else {}
    present = plain.keys() | converted.keys()
    groups = _tie_groups(model)
    tied = _tied(state, present, groups)
    ignorable = _ignorable(model)
    return KeyMap(
        state_to_checkpoint={name: plain[name] for name in state if name in plain and name not in mismatched},
        tied=tied,
        missing=[name for name in state if name not in present and name not in tied],
        converted={name: converted[name] for name in state if name in converted},
        mismatched=mismatched,
        unexpected=sorted(name for name in unexpected if not ignorable(name)),
        ignored=sorted(name for name in unexpected if ignorable(name)),
        stored_twice={name: group[0] for group in groups for name in group[1:] if {name, group[0]} <= plain.keys()},
    )


def _rename_all(
    model: PreTrainedModel, state: dict[str, Any], checkpoint: Iterable[str]
) -> tuple[dict[str, str], dict[str, Conversion], list[str]]:
    """Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`, without tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    plain: dict[str, str] = {}
    converted: dict[str, Conversion] = {}
    unexpected: list[str] = []
    for stored in sorted(checkpoint, key=dot_natural_key):  # the order matters to renames that wait for another
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if name in state and pattern is not None:
            for target in _targets(name, by_pattern[pattern], state):
                converted[target] = _with_source(converted.get(target), by_pattern[pattern], stored)
        elif name in state and name not in plain:
            plain[name] = stored
        else:
            unexpected.append(stored)
    return plain, converted, unexpected


def _targets(name: str, converter: Any, state: Mapping[str, Any]) -> list[str]:
    """All state-dict names that a converter makes; `name` is the one after its first target pattern."""
    first, *_ = converter.target_patterns
    names = [name.replace(first, target) for target in converter.target_patterns]
    return [target for target in names if target in state]


def _with_source(before: Conversion | None, converter: Any, stored: str) -> Conversion:
    operations = tuple(type(operation).__name__ for operation in converter.operations)
    return Conversion(operations, (*(before.sources if before else ()), stored))


def _mismatched(
    state: Mapping[str, Any], plain: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Shape, Shape]]:
    pairs = {name: (tuple(shapes[stored]), tuple(state[name].shape)) for name, stored in plain.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _tie_groups(model: PreTrainedModel) -> list[list[str]]:
    """Names that share one parameter, the one that owns it first."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, list[str]] = {}
    for name in ties:
        owner, seen = ties[name], {name}
        while owner in ties and owner not in seen:
            seen.add(owner)
            owner = ties[owner]
        groups.setdefault(owner, [owner]).append(name)
    return list(groups.values())


def _tied(state: Mapping[str, Any], present: Collection[str], groups: list[list[str]]) -> dict[str, str]:
    tied = {}
    for group in groups:
        owner = next((name for name in group if name in present), None)
        if owner is not None:
            tied.update({name: owner for name in group if name in state and name not in present})
    return tied


def _ignorable(model: PreTrainedModel) -> Callable[[str], bool]:
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)
