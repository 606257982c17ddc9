"""Certificates: the folded model's outputs against the unfolded one's, on random and on real inputs.

The unfolded model is the adapted model in torch, evaluation mode, every delta in place. A certificate says what was
compared, on which inputs, and the largest absolute and relative differences; a merge or an export whose outputs
differ by more than its tolerance fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import fail

if TYPE_CHECKING:
    import torch

    from peftc.frontend.trace import InputSpec

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "A delta is one row: a form at a representation, inserted and composed.",
    "Rows are vectors.",
)

SHAPES = (
    {"batch": 1, "sequence": 7, "target": 5},
    {"batch": 3, "sequence": 12, "target": 4},
    {"batch": 2, "sequence": 16, "target": 9},
)
"""Batch 1, batch > 1, and a sequence length that was not traced."""


_TOKENIZERS = ("tokenizer.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on one set of inputs. `relative` is the difference over the largest magnitude of the output."""

    what: str
    inputs: str
    dtype: str
    absolute: float
    relative: float
    tolerance: float
    scale: float
    """The largest finite magnitude of the unfolded output; beyond 1 the tolerance grows with it."""

    @property
    def holds(self) -> bool:
        return math.isfinite(self.absolute) and self.absolute <= self.tolerance * max(1.0, self.scale)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


Inputs = Mapping[str, "torch.Tensor"]
Run = Callable[[Inputs], Sequence["torch.Tensor"]]


def compare(
    what: str, unfolded: Run, folded: Run, batches: Iterable[tuple[str, Inputs]], *, tolerance: float, dtype: str
) -> list[Comparison]:
    """Run both on every batch. Rows of padding are left out where the batch has a mask.

    An entry that is no number on either side, or infinite on one, makes the difference so, and then nothing holds.
    """
    results = []
    for label, inputs in batches:
        differences, sizes = [0.0], [0.0]
        for a, b in zip(unfolded(inputs), folded(inputs), strict=True):
            if not a.is_floating_point():
                continue
            a, b = real_rows(a.double(), inputs), real_rows(b.double(), inputs)
            differences.append(float((a - b).abs().masked_fill(a == b, 0).max()))  # infinities that agree are equal
            sizes.append(float(a.abs().masked_fill(a.isinf(), 0).max()))
        absolute, scale = _largest(differences), _largest(sizes)
        results.append(Comparison(what, label, dtype, absolute, absolute / max(scale, 1e-30), tolerance, scale))
    return results


def _largest(values: Sequence[float]) -> float:
    """The largest of `values`; NaN where one is, which Python's `max` may pass over."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def real_rows(value: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """`value` without the rows of padding, where it has a row for each token of a padded batch."""
    mask = inputs.get("attention_mask")
    if mask is None or value.dim() < 3 or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]


def refuse_failed(comparisons: Iterable[Comparison]) -> None:
    """Raise `PeftcError` E039 when a comparison does not hold."""
    for c in comparisons:
        if not c.holds:
            fail(
                "E039",
                f"{c.what} differs from the unfolded model by {c.absolute:.2e} on {c.inputs} ({c.dtype}); "
                f"the tolerance is {c.tolerance:.0e}",
                help="nothing was written; please report this with the rule and the model's config",
            )


def random_batches(specs: Mapping[str, InputSpec], vocabulary: int, *, seed: int = 0) -> list[tuple[str, Inputs]]:
    """One batch for each of `SHAPES`; with a batch of more than one, some rows are padded on the right."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    batches = []
    for sizes in SHAPES:
        tensors: dict[str, torch.Tensor] = {}
        for name, spec in specs.items():
            shape = [sizes[s] if isinstance(s, str) else s for s in spec.sizes]
            tensors[name] = _random(name, spec, shape, vocabulary, generator)
        _pad(tensors)
        batches.append((f"random, batch {sizes['batch']}, length {sizes['sequence']}", tensors))
    return batches


def _random(name: str, spec: InputSpec, shape: list[int], vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    if name == "position_ids":
        return torch.arange(shape[1]).expand(shape[0], -1).clone()
    if "mask" in name:
        return torch.ones(shape, dtype=spec.dtype)
    if name == "token_type_ids":
        return torch.zeros(shape, dtype=spec.dtype)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    return torch.randint(0, vocabulary, shape, generator=generator)


def _pad(tensors: dict[str, torch.Tensor]) -> None:
    mask = tensors.get("attention_mask")
    if mask is not None and mask.shape[0] > 1:
        mask[0, -(mask.shape[1] // 3) :] = 0


def text_batches(directory: Path, specs: Mapping[str, InputSpec]) -> list[tuple[str, Inputs]]:
    """A batch of real text, padded, when the model reads text and its tokenizer lies beside it."""
    import torch

    if "input_ids" not in specs or not any((directory / file).exists() for file in _TOKENIZERS):
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded: dict[str, torch.Tensor] = dict(tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    tensors = {name: encoded[name] for name in specs if name in encoded}
    ids = encoded["input_ids"]
    for name, spec in specs.items():
        if name not in tensors:
            length = ids.shape[1] if "sequence" in spec.sizes else 5
            shape = [ids.shape[0] if s == "batch" else length if isinstance(s, str) else s for s in spec.sizes]
            tensors[name] = _random(name, spec, shape, 2, torch.Generator().manual_seed(0))
    return [(f"text, {len(TEXTS)} sentences", tensors)]
