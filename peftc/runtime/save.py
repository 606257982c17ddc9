"""`save_pretrained`: an adapted model back into a delta directory.

The directory may hold other files (the Trainer keeps its optimizer there), so files are replaced one by one, the
manifest last. In a checkpoint of the Trainer there is an index of the tensors too: `resume_from_checkpoint` and
`load_best_model_at_end` read the deltas through it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peftc.diagnostics import fail
from peftc.runtime.delta_dir import MANIFEST, RULE, TENSORS, write_files
from peftc.store.atomic import atomic_directory, atomic_files
from peftc.store.model_dir import CONFIG, INDEX, WEIGHTS, ModelDir
from peftc.store.safetensors_io import TensorSpec, dtype_code

if TYPE_CHECKING:
    import torch

    from peftc.runtime.graph_model import Surgery

_CHECKPOINT: Final = re.compile(r"checkpoint-\d+")


def save_model(model: Any, target: Path, values: Mapping[str, torch.Tensor]) -> None:
    """Save `values`, which `values_to_save` gives, as the delta directory `target`.

    Raises `PeftcError` E036: the place cannot be used.
    """
    surgery: Surgery = model.surgery
    _refuse_model(target, surgery)
    entries = [TensorSpec(name, dtype_code(value.dtype), tuple(value.shape)) for name, value in values.items()]

    def support(fresh: Path) -> None:
        _copy_support(surgery, fresh, target)
        config = {**model.config.to_dict(), "architectures": [surgery.base_class.__name__]}
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if _CHECKPOINT.fullmatch(target.name):
            index = {"metadata": {}, "weight_map": dict.fromkeys(values, TENSORS)}
            (fresh / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(fresh: Path) -> None:
        write_files(
            fresh,
            target,
            plan=surgery.plan,
            base=surgery.provenance,
            entries=entries,
            produce=values.__getitem__,
            support=support,
            saved=True,
        )

    if not target.exists():
        with atomic_directory(target, replace=False) as fresh:
            write(fresh)
        return
    with atomic_files(target, last=MANIFEST) as fresh:
        write(fresh)
        if not _same_text(fresh / RULE, target / RULE):
            (target / MANIFEST).unlink(missing_ok=True)  # a run killed from here on leaves no delta directory


def _refuse_model(target: Path, surgery: Surgery) -> None:
    if surgery.base_dir is not None and target.resolve() == surgery.base_dir.resolve():
        fail("E036", f"{target} is the base model itself", help="save into another directory")
    if (target / WEIGHTS).exists():
        fail("E036", f"{target} holds a model's weights ({WEIGHTS})", help="save into another directory")


def values_to_save(model: Any, state: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The deltas and trained base tensors of `model`, or those of `state`, whole.

    Where they are sharded (FSDP2) this is a collective: every process has to take part. Raises `PeftcError` E040.
    """
    names = [*model.surgery.plan.parameters, *model.surgery.plan.trained]
    if state is None:
        return {name: _whole(model.get_parameter(name)) for name in names}
    missing = [name for name in names if name not in state]
    if missing:
        fail("E040", f"the state dict to be saved lacks {missing[0]}", help="give the state dict of the whole model")
    return {name: _whole(state[name]) for name in names}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    gather = getattr(tensor.detach(), "full_tensor", None)  # a DTensor has it
    return (tensor.detach() if gather is None else gather()).cpu()


def _copy_support(surgery: Surgery, fresh: Path, target: Path) -> None:
    """Tokenizer files of the base, but for those that the target has: they may have been saved there on purpose."""
    if surgery.base_dir is None or not (surgery.base_dir / CONFIG).exists():
        return  # the base has moved since it was loaded
    for copy in ModelDir.open(surgery.base_dir).copy_support_files(fresh):
        if (target / copy.relative_to(fresh)).exists():
            copy.unlink()


def _same_text(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
