"""The base model of an adapter: its directory, its class, and its traced program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peftc.diagnostics import fail
from peftc.frontend.trace import Skeleton, build_skeleton, default_inputs
from peftc.interop.adapter import CONFIG, Adapter
from peftc.interop.layout import PREFIX
from peftc.ir.program import Program
from peftc.lang.complaints import shown
from peftc.pipeline import analyse
from peftc.progress import Progress
from peftc.runtime.quantized import refuse_quantized_checkpoint
from peftc.store.heads import HEADS, resolve
from peftc.store.model_dir import ModelDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASKS: Final[dict[str, str]] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "base",
}
"""PEFT's word for a task -> the head that it stands for."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model as an adapter was made for it."""

    directory: ModelDir
    head: str | None
    num_labels: int | None
    skeleton: Skeleton
    program: Program

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter by each of its names; those of a tied weight are one object."""
        return dict(self.skeleton.model.named_parameters(remove_duplicate=False))


def model_dir_of(adapter: Adapter, given: str | Path | None) -> ModelDir:
    """The base's directory: `given`, or where the adapter says it is. Raises `PeftcError` E030, E033."""
    place = given if given is not None else adapter.config.get("base_model_name_or_path")
    if given is None and not (isinstance(place, str) and place and Path(place).is_dir()):
        name = shown(place) if isinstance(place, str) and place else "no model"
        message = f"{adapter.path / CONFIG} names {name} as its base, which is no directory here"
        fail("E030", message, help="say where the base model is with --model MODEL_DIR; peftc downloads nothing")
    base = ModelDir.open(str(place))
    base.refuse_adapted()
    refuse_quantized_checkpoint(base.config, base.path)
    return base


def open_base(adapter: Adapter, base: ModelDir, head: str | None, num_labels: int | None, progress: Progress) -> Base:
    """Build and trace the class of model that the adapter is for. Raises `PeftcError` E030, E032, E038."""
    head = head or _head_of(adapter, base)
    cls, config = resolve(base.config, base.path, head, num_labels)
    if num_labels is None and (num_labels := _labels(adapter, cls, config)) is not None:
        cls, config = resolve(base.config, base.path, head, num_labels)
    progress.step(f"trace {cls.__name__}")
    skeleton = build_skeleton(cls, config)
    return Base(base, head, num_labels, skeleton, analyse(skeleton, default_inputs(skeleton.model)))


def _head_of(adapter: Adapter, base: ModelDir) -> str | None:
    """The head that the adapter's task, or else the class it was saved from, stands for; None for the base's own."""
    task, mapping = adapter.config.get("task_type"), adapter.config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    own, _ = resolve(base.config, base.path)
    wanted = [TASKS[task]] if isinstance(task, str) and task in TASKS else list(HEADS) if isinstance(name, str) else []
    if own.__name__ == name:
        return None
    for head in wanted:
        cls = _class(base, head)
        if cls is not None and (len(wanted) == 1 or cls.__name__ == name):
            return None if cls is own else head
    return None


def task_of(base: ModelDir, cls: type[PreTrainedModel]) -> str | None:
    """PEFT's word for the task of a model class."""
    return next((task for task, head in TASKS.items() if _class(base, head) is cls), None)


def _class(base: ModelDir, head: str) -> type[PreTrainedModel] | None:
    from peftc.diagnostics import PeftcError

    try:
        return resolve(base.config, base.path, head)[0]
    except PeftcError:
        return None


def _labels(adapter: Adapter, cls: type[PreTrainedModel], config: Any) -> int | None:
    """The number of labels where the adapter holds a head of another one than the config's."""
    if "Classification" not in cls.__name__:
        return None
    sizes = {name: tuple(parameter.shape) for name, parameter in build_skeleton(cls, config).model.named_parameters()}
    found = set(_first_sizes(adapter.tensors, sizes, config.num_labels))
    return found.pop() if len(found) == 1 else None


def _first_sizes(tensors: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]], labels: int) -> list[int]:
    """First axes of stored parameters that differ from the model's, where the model's has one entry a label."""
    found: list[int] = []
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX).removeprefix("base_model.").replace(".modules_to_save.", ".")
        ours = sizes.get(name)
        if ours is not None and ours[0] == labels and ours[1:] == info.shape[1:] and ours != info.shape:
            found.append(info.shape[0])
    return found
