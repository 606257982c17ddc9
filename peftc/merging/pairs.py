"""Two checkpoints of one model, tensor by tensor: what a tuned one changed of its base.

    pairs = Pairs.open("base", "tuned")
    pairs.changed                        # state-dict names
    pairs.difference(name).norm()        # of a matrix, in blocks of rows

Both are read by the names of one model, so checkpoints with names of an older day or with other shards compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftc.diagnostics import fail
from peftc.frontend.trace import Skeleton, build_skeleton
from peftc.merging.lowrank import Matrix
from peftc.runtime.quantized import refuse_quantized_checkpoint
from peftc.store.heads import offered, resolve
from peftc.store.keys import KeyMap, key_map
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import Header, TensorInfo, read_bytes, read_rows, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS, _STEP = 1 << 20, 1 << 24


@dataclass(frozen=True)
class Pairs:
    """`head` and `num_labels` make the base the tuned model's class; None where it is of that class itself."""

    base: ModelDir
    tuned: ModelDir
    skeleton: Skeleton
    head: str | None
    num_labels: int | None

    @staticmethod
    def open(base: str | Path, tuned: str | Path) -> Pairs:
        """Open both. Raises `PeftcError`: E030 to E033, E055; E066, they are not of one model."""
        before, after = _opened(base), _opened(tuned)
        if before.config["model_type"] != after.config["model_type"]:
            kinds = f"a {before.config['model_type']} model, and {after.path} a {after.config['model_type']} model"
            fail("E066", f"{before.path} is {kinds}", help="give the checkpoint that it was tuned from")
        head, labels = _head(before, after)
        cls, config = resolve(before.config, before.path, head, labels)
        pairs = Pairs(before, after, build_skeleton(cls, config), head, labels)
        pairs._refuse_others()
        return pairs

    @cached_property
    def _before(self) -> KeyMap:
        return key_map(self.skeleton.model, self.base.shapes())

    @cached_property
    def _after(self) -> KeyMap:
        return key_map(self.skeleton.model, self.tuned.shapes())

    @cached_property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that the tuned checkpoint alone holds: a new head."""
        parameters = dict(self.skeleton.model.named_parameters(remove_duplicate=False))
        names = (*self._before.missing, *self._before.mismatched)
        return tuple(name for name in names if name in parameters and self._key(self._after, name) is not None)

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """State-dict names of stored tensors whose values differ, in the base's order."""
        return tuple(name for name in self._before.state_to_checkpoint if self._differs(name))

    @cached_property
    def unreachable(self) -> tuple[str, ...]:
        """Names of what differs and no delta directory holds: tensors that transformers computes while it loads, and
        buffers."""
        stored = {key for made in self._before.converted.values() for key in made.sources}
        both = [key for key in stored if key in self.tuned.tensors]
        computed = [key for key in both if _differ(self.base.tensors[key], self.tuned.tensors[key])]
        parameters = dict(self.skeleton.model.named_parameters(remove_duplicate=False))
        return (*sorted(computed), *(name for name in self.changed if name not in parameters))

    def stored(self, name: str) -> tuple[Header, TensorInfo]:
        """Where the tuned checkpoint holds a tensor."""
        key = self._key(self._after, name)
        assert key is not None
        return self.tuned.tensors[key]

    def difference(self, name: str) -> Matrix:
        """Tuned less base, of a matrix as it is stored, in float64."""
        before, info = self.base.tensors[self._before.state_to_checkpoint[name]]
        after, other = self.stored(name)
        rows, columns = info.shape
        step = max(1, _ROWS // max(1, columns))

        def blocks() -> Iterator[tuple[int, torch.Tensor]]:
            for first in range(0, rows, step):
                last = min(first + step, rows)
                old = read_rows(before, info.name, first, last).double()
                yield first, read_rows(after, other.name, first, last).double().sub_(old)

        return Matrix((rows, columns), blocks)

    @staticmethod
    def _key(names: KeyMap, name: str) -> str | None:
        return names.state_to_checkpoint.get(names.tied.get(name, name))

    def _differs(self, name: str) -> bool:
        return _differ(self.base.tensors[self._before.state_to_checkpoint[name]], self.stored(name))

    def _refuse_others(self) -> None:
        """Raise E066 where a tensor has no counterpart of its shape, or tied ones have come apart."""
        lost = [name for name in self._before.state_to_checkpoint if self._key(self._after, name) is None]
        for name in lost:
            shapes = self._after.mismatched.get(name)
            why = f"holds {name} as {list(shapes[0])}, and the base as {list(shapes[1])}" if shapes else f"lacks {name}"
            fail("E066", f"{self.tuned.path} {why}", help="give the checkpoint that it was tuned from")
        for name, owner in self._before.tied.items():
            key, other = (self._after.state_to_checkpoint.get(one) for one in (name, owner))
            if key and other and _differ(self.tuned.tensors[key], self.tuned.tensors[other]):
                message = f"{name} and {owner} are one tensor of {self.base.path} and two of {self.tuned.path}"
                fail("E066", message, help="a delta directory has one value for both")


def _opened(path: str | Path) -> ModelDir:
    opened = ModelDir.open(path)
    opened.refuse_adapted()
    opened.require_weights()
    refuse_quantized_checkpoint(opened.config, opened.path)
    return opened


def _head(base: ModelDir, tuned: ModelDir) -> tuple[str | None, int | None]:
    """What makes the base a model of the tuned one's class. Raises E066 where nothing does."""
    cls, config = resolve(base.config, base.path)
    wanted, other = resolve(tuned.config, tuned.path)
    labelled = "Classification" in wanted.__name__
    if cls is wanted and not (labelled and config.num_labels != other.num_labels):
        return None, None
    labels = other.num_labels if labelled else None
    for head in offered(config):
        if _class(base, head, labels) is wanted:
            return head, labels
    message = f"{tuned.path} is a {wanted.__name__}, which no --head makes of the {cls.__name__} at {base.path}"
    fail("E066", message, help="load the base as that class with transformers and save it")


def _class(base: ModelDir, head: str, labels: int | None) -> type[PreTrainedModel] | None:
    cls, _ = resolve(base.config, base.path, head)
    return None if labels is not None and "Classification" not in cls.__name__ else cls


def _differ(one: tuple[Header, TensorInfo], other: tuple[Header, TensorInfo]) -> bool:
    """Whether two stored tensors of one shape hold other values."""
    (before, old), (after, new) = one, other
    if old.dtype == new.dtype:
        return any(
            read_bytes(before, old.name, start, _STEP) != read_bytes(after, new.name, start, _STEP)
            for start in range(0, old.nbytes, _STEP)
        )
    if not old.shape:
        return not torch.equal(read_tensor(before, old.name).double(), read_tensor(after, new.name).double())
    step = max(1, _ROWS // max(1, old.numel // max(1, old.shape[0])))
    spans = ((first, min(first + step, old.shape[0])) for first in range(0, old.shape[0], step))
    pairs = ((read_rows(before, old.name, *span), read_rows(after, new.name, *span)) for span in spans)
    return any(not torch.equal(ours.double(), theirs.double()) for ours, theirs in pairs)
