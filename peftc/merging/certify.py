"""Certificates: the folded model's outputs against the unfolded one's, on random and on real inputs.

The unfolded model is the adapted model in torch, evaluation mode, every delta in place. A certificate says what was
compared, on which inputs, and the largest absolute and relative differences; a merge or an export whose outputs
differ by more than its tolerance fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


_TEXTS_AT_ONCE, _MOST_TOKENS = 8, 512
_PIECE = 1 << 20
"""Elements that are compared at a time: 8 MiB in float64."""
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
    top1: float | None = None
    """Of a language model: the share of places at which both have the same most likely token."""

    @property
    def holds(self) -> bool:
        return math.isfinite(self.absolute) and self.absolute <= self.tolerance * max(1.0, self.scale)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


Inputs = Mapping[str, "torch.Tensor"]
Run = Callable[[Inputs], Sequence["torch.Tensor"]]
Batches = list[tuple[str, Inputs]]


def compare(
    what: str,
    unfolded: Run,
    folded: Run,
    batches: Iterable[tuple[str, Inputs]],
    *,
    tolerance: float,
    dtype: str,
    vocabulary: int | None = None,
) -> list[Comparison]:
    """Run both on every batch. Rows of padding are left out where the batch has a mask.

    An entry that is no number on either side, or infinite on one, makes the difference so, and then nothing holds.
    With a `vocabulary`, an output of that width is logits, and their most likely tokens are counted.
    """
    return [compared(what, label, i, unfolded(i), folded(i), tolerance, dtype, vocabulary) for label, i in batches]


def compared(
    what: str,
    label: str,
    inputs: Inputs,
    unfolded: Sequence[torch.Tensor],
    folded: Sequence[torch.Tensor],
    tolerance: float,
    dtype: str,
    vocabulary: int | None = None,
) -> Comparison:
    """The comparison of two lists of outputs for one batch."""
    differences, sizes, top1 = [0.0], [0.0], None
    for one, other in zip(unfolded, folded, strict=True):
        if not one.is_floating_point():
            continue
        one, other, agreed = real_rows(one, inputs), real_rows(other, inputs), 0
        for a, b in _pieces(one, other):
            differences.append(float((a - b).abs().masked_fill(a == b, 0).max()))  # infinities that agree are equal
            sizes.append(float(a.abs().masked_fill(a.isinf(), 0).max()))
            agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        if top1 is None and one.shape[-1] == vocabulary:
            top1 = agreed / (one.numel() // one.shape[-1])
    absolute, scale = _largest(differences), _largest(sizes)
    relative = absolute / max(scale, 1e-30)
    return Comparison(what, label, dtype, absolute, relative, tolerance, scale, top1)


def _pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of both at a time, in float64: logits are large, and a comparison makes several tensors of each."""
    rows = max(1, _PIECE // one.shape[-1])
    parts = (tensor.reshape(-1, tensor.shape[-1]).split(rows) for tensor in (one, other))
    return ((a.double(), b.double()) for a, b in zip(*parts, strict=True))


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


def random_batches(
    specs: Mapping[str, InputSpec], vocabulary: int, *, seed: int = 0, shapes: Sequence[Mapping[str, int]] = SHAPES
) -> list[tuple[str, Inputs]]:
    """One batch for each of `shapes`; with a batch of more than one, some rows are padded on the right."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    batches = []
    for sizes in shapes:
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


def text_batches(
    directory: Path, specs: Mapping[str, InputSpec], texts: Sequence[str] = ()
) -> list[tuple[str, Inputs]]:
    """Batches of `texts` (or `TEXTS`), padded, when the model reads text and its tokenizer lies beside it.

    Long texts are cut. Raises `PeftcError` E014 when there are `texts` and no tokenizer to read them.
    """
    if "input_ids" not in specs or not any((directory / file).exists() for file in _TOKENIZERS):
        if texts:
            fail("E014", f"--verify-with: {directory} has no tokenizer to read text with", help="leave it out")
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lines, most = list(texts or TEXTS), min(_MOST_TOKENS, tokenizer.model_max_length)
    batches = []
    for start in range(0, len(lines), _TEXTS_AT_ONCE):
        chosen = lines[start : start + _TEXTS_AT_ONCE]
        encoded = dict(tokenizer(chosen, padding=True, truncation=True, max_length=most, return_tensors="pt"))
        label = f"text {start + 1} to {start + len(chosen)}" if texts else f"text, {len(chosen)} sentences"
        batches.append((label, _completed(encoded, specs)))
    return batches


def _completed(encoded: Mapping[str, torch.Tensor], specs: Mapping[str, InputSpec]) -> dict[str, torch.Tensor]:
    """What a tokenizer made, and the inputs that it does not make."""
    import torch

    tensors = {name: encoded[name] for name in specs if name in encoded}
    ids = encoded["input_ids"]
    for name, spec in specs.items():
        if name not in tensors:
            length = ids.shape[1] if "sequence" in spec.sizes else 5
            shape = [ids.shape[0] if s == "batch" else length if isinstance(s, str) else s for s in spec.sizes]
            tensors[name] = _random(name, spec, shape, 2, torch.Generator().manual_seed(0))
    return tensors
