"""The outputs of what was written against those of the unfolded model.

A small model is run whole: the unfolded one as `peftc.load` makes it, the merged checkpoint as transformers loads it.
One of more than `WHOLE` bytes is run from disk, both sides as traced graphs in float32, so that the memory it takes
does not grow with the model (`peftc.runtime.streamed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from peftc.frontend.trace import InputSpec, build_skeleton, default_inputs, quiet
from peftc.merging.adapted import Adapted
from peftc.merging.certify import Batches, Comparison, Inputs, Run, compare, compared, random_batches, text_batches
from peftc.pipeline import analyse
from peftc.runtime.streamed import StreamedRun
from peftc.store.heads import resolve
from peftc.store.model_dir import ModelDir
from peftc.store.stored import Stored

WHOLE = 1 << 30
"""Bytes of a base up to which both models are held in memory."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Largest difference of outputs of order 1 that a certificate lets pass, by the dtype compared or stored in."""


def batches_for(adapted: Adapted, specs: Mapping[str, InputSpec], texts: Sequence[str] = ()) -> Batches:
    """Random inputs, and `texts` (or some of ours) where the model reads text."""
    vocabulary = getattr(adapted.skeleton.config.get_text_config(), "vocab_size", 100)
    return [*random_batches(specs, vocabulary), *text_batches(adapted.base.path, specs, texts)]


def vocabulary_of(adapted: Adapted) -> int | None:
    """The width of the logits of a language model."""
    model = adapted.skeleton.model
    return model.config.get_text_config().vocab_size if model.get_output_embeddings() is not None else None


def compare_checkpoint(adapted: Adapted, merged: Path, texts: Sequence[str] = ()) -> list[Comparison]:
    """The merged checkpoint at `merged` against the unfolded model."""
    specs = default_inputs(adapted.skeleton.model)
    batches = batches_for(adapted, specs, texts)
    if adapted.base.nbytes > WHOLE:
        return _from_disk(adapted, merged, specs, batches)
    model, dtype = adapted.model, adapted.dtype
    with quiet():
        plain: Any = adapted.base_class.from_pretrained(merged, dtype=dtype).eval()
        if plain._can_set_experts_implementation():
            plain.set_experts_implementation("eager")  # torch's grouped products know no float64
    words = vocabulary_of(adapted)
    found = _compare_whole(model, plain, specs, batches, dtype, TOLERANCE[dtype], words)
    if dtype == torch.float32:
        wide = _in_float64(specs)
        again = batches_for(adapted, wide, texts)
        found += _compare_whole(
            model.double(), plain.double(), wide, again, torch.float64, TOLERANCE[torch.float32], words
        )
        model.float()
    return found


def _compare_whole(
    model: Any,
    plain: Any,
    specs: Mapping[str, InputSpec],
    batches: Batches,
    dtype: torch.dtype,
    tolerance: float,
    vocabulary: int | None,
) -> list[Comparison]:
    def folded(inputs: Inputs) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            extra = {"use_cache": False} if hasattr(plain.config, "use_cache") else {}
            return tensors_of(plain(**{name: inputs[name] for name in specs}, **extra))

    return compare(
        "the merged checkpoint", unfolded(model, specs), folded, batches,
        tolerance=tolerance, dtype=word(dtype), vocabulary=vocabulary,
    )  # fmt: skip


def _from_disk(adapted: Adapted, merged: Path, specs: Mapping[str, InputSpec], batches: Batches) -> list[Comparison]:
    dtype = torch.float64 if adapted.dtype == torch.float64 else torch.float32
    inputs = [inputs for _, inputs in batches]
    before = unfolded_from_disk(adapted, specs, dtype, inputs)
    written = ModelDir.open(merged)
    cls, config = resolve(written.config, merged)
    plain = build_skeleton(cls, config, dtype)
    after = StreamedRun(analyse(plain, specs), Stored(written, plain), dtype)(inputs)
    tolerance, words = TOLERANCE[adapted.dtype], vocabulary_of(adapted)
    return [
        compared("the merged checkpoint", label, inputs, one, other, tolerance, word(dtype), words)
        for (label, inputs), one, other in zip(batches, before, after, strict=True)
    ]


def unfolded_from_disk(
    adapted: Adapted, specs: Mapping[str, InputSpec], dtype: torch.dtype, inputs: Sequence[Inputs]
) -> list[list[torch.Tensor]]:
    """What the unfolded model answers in `dtype`, run a weight at a time."""
    program, plan = adapted.rewritten(specs, build_skeleton(adapted.base_class, adapted.skeleton.config, dtype))
    return StreamedRun(program, adapted.tensors(plan), dtype)(inputs)


def unfolded(model: Any, specs: Mapping[str, InputSpec]) -> Run:
    """The adapted model on inputs of these names."""

    def run(inputs: Inputs) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return tensors_of(model(**{name: inputs[name] for name in specs}))

    return run


def _in_float64(specs: Mapping[str, InputSpec]) -> dict[str, InputSpec]:
    return {n: InputSpec(torch.float64 if s.dtype.is_floating_point else s.dtype, s.sizes) for n, s in specs.items()}


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's answer, in order."""
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]
