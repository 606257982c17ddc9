"""The six properties, each as a difference of two runs that should be equal, over the size of the larger.

A base is asked first. What it has exactly (1e-10 in float64) an adapted model must have exactly; where the base itself
is exact to float32 only, as models are that round inside to float32, that is the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from decoding.speaker import Speaker

LENGTH, FIRST, CHANGED, SHORT = 12, 5, 7, (12, 9, 6)
LOWEST, HIGHEST = 5, 19
"""Token ids: above padding and the like, below every special token that a small config has."""
BOUNDS = {"exact": 1e-10, "float32": 2e-4}
ROUNDED = 1e-6
"""Of a model in float64 that rounds to float32 inside: a base may be equal bit for bit, where one with a prefix, whose
products have another length, sums in another order.
"""


class LacksError(Exception):
    """A model does not have a property, with how in words."""


_SHIFT = [0]


@contextmanager
def other_texts(number: int) -> Iterator[None]:
    """Inside, every text is another one."""
    _SHIFT[0] = 10 * number
    try:
        yield
    finally:
        _SHIFT[0] = 0


def text(seed: int = 7, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed + _SHIFT[0])
    return torch.randint(LOWEST, HIGHEST, (len(SHORT), length), generator=generator)


def padded(ids: Tensor, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows cut to the lengths of `SHORT`, and their mask."""
    columns = torch.arange(ids.shape[1])
    lengths = torch.tensor(SHORT)[:, None]
    mask = columns < lengths if side == "right" else columns >= ids.shape[1] - lengths
    return torch.where(mask, ids, 1), mask.long()


def cached(speaker: Speaker) -> float:
    ids = text()
    return _difference(speaker.steps(ids, FIRST), speaker.whole(ids)[:, FIRST - 1 :])


def causal(speaker: Speaker) -> float:
    ids = text()
    changed = ids.clone()
    changed[:, CHANGED] = LOWEST + (ids[:, CHANGED] - LOWEST + 3) % (HIGHEST - LOWEST)
    before, after = speaker.whole(ids), speaker.whole(changed)
    if float((before - after)[:, CHANGED].abs().max()) < 1e-6 * _size(before):
        raise LacksError("a changed token changes nothing at its own place")
    return _difference(after[:, :CHANGED], before[:, :CHANGED])


def left(speaker: Speaker) -> float:
    return _rows_alone(speaker, "left")


def right(speaker: Speaker) -> float:
    return _rows_alone(speaker, "right")


def _rows_alone(speaker: Speaker, side: str) -> float:
    """A decoder's own text is padded, or the text that an encoder reads.

    A row stands alone as a batch of two copies: for a batch of one, positions are another kind of input and a trace
    of their own.
    """
    ids, mask = padded(text(), side=side)
    if not speaker.seq2seq:
        together = speaker.whole(ids, mask)
        alone = [speaker.whole(ids[[row, row]][:, mask[row].bool()]) for row in range(len(ids))]
        return max(_difference(together[row, mask[row].bool()], one[0]) for row, one in enumerate(alone))
    if set(speaker.given) != {"input_ids", "attention_mask"}:
        raise LacksError("its encoder reads no text that can be padded")
    together = speaker.reading({"input_ids": ids, "attention_mask": mask}).whole(text(8))
    found = []
    for row in range(len(ids)):
        own = ids[[row, row]][:, mask[row].bool()]
        alone = speaker.reading({"input_ids": own, "attention_mask": torch.ones_like(own)})
        found.append(_difference(together[row], alone.whole(text(8)[[row, row]])[0]))
    return max(found)


def sdpa(speaker: Speaker) -> float:
    """The padding goes to the right in the one text and to the left in the other; only real tokens are compared."""
    model = speaker.model
    before = model.config._attn_implementation
    if before != "sdpa":
        raise LacksError(f"its attention is {before}")
    found = []
    for side in ("left", "right"):
        ids, mask = padded(text(), side=side)
        if speaker.seq2seq:
            real = torch.ones_like(mask).bool()
            one = speaker if "input_ids" not in speaker.given else speaker.reading(
                {"input_ids": ids, "attention_mask": mask}
            )  # fmt: skip
            call: tuple[Tensor, Tensor | None] = (text(8), None)
        else:
            one, real, call = speaker, mask.bool(), (ids, mask)
        fused = one.whole(*call)
        model.set_attn_implementation("eager")
        try:
            spelled_out = one.whole(*call)
        finally:
            model.set_attn_implementation(before)
        found.append(_difference(spelled_out[real], fused[real]))
    return max(found)


def greedy(speaker: Speaker) -> float:
    """0 where `generate` writes what an uncached loop writes, padded at the left; a tie of logits may go either way."""
    if speaker.seq2seq:
        ids = torch.full((len(SHORT), 1), _start(speaker.model))
        mask = torch.ones_like(ids)
    else:
        ids, mask = padded(text(), side="left")
    expected, margins = speaker.loop(ids, mask)
    found = speaker.written(ids, mask)
    for row in range(len(ids)):
        wrong = (found[row] != expected[row]).nonzero()
        if len(wrong) and float(margins[row, int(wrong[0])]) > 1e-6:
            raise LacksError(
                f"row {row} differs from the loop at token {int(wrong[0])}: {found[row].tolist()} for "
                f"{expected[row].tolist()}"
            )
    return 0.0


PROPERTIES: Mapping[str, Callable[[Speaker], float]] = {
    "cached": cached, "left": left, "right": right, "sdpa": sdpa, "causal": causal, "greedy": greedy,
}  # fmt: skip


def _start(model: Any) -> int:
    for source in (model.generation_config, model.config):
        if isinstance(token := getattr(source, "decoder_start_token_id", None), int):
            return token
    return 0


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the size of what is expected; infinite where numbers are missing."""
    if found.shape != expected.shape:
        raise LacksError(f"shape {tuple(found.shape)} for {tuple(expected.shape)}")
    if not bool(found.isfinite().all() and expected.isfinite().all()):
        raise LacksError("it answers no finite number")
    return float((found - expected).abs().max()) / _size(expected)


def _size(values: Tensor) -> float:
    return max(1e-30, float(values.abs().max()))
