"""Greedy and beam search by hand, over the full forward of the whole text at every token. They know no end token."""

from __future__ import annotations

import torch
from torch import Tensor

from generation.conftest import Subject

START = {"t5": 0, "bart": 2}


def start(subject: Subject, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tokens that the text starts with, and their mask."""
    if not subject.seq2seq:
        return given["input_ids"], given["attention_mask"]
    ids = torch.full((len(given["input_ids"]), 1), START[subject.family.name])
    return ids, torch.ones_like(ids)


def greedy(subject: Subject, given: dict[str, Tensor], count: int) -> Tensor:
    ids, mask = start(subject, given)
    for _ in range(count):
        token = subject.logits(given, ids, mask)[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


def beams(subject: Subject, given: dict[str, Tensor], count: int, width: int) -> Tensor:
    """The best of `width` beams for each row: [rows, length]."""
    found = []
    for row in range(len(given["input_ids"])):
        one = {name: value[row : row + 1] for name, value in given.items()}
        ids, mask = start(subject, one)
        ids, mask = ids.expand(width, -1), mask.expand(width, -1)
        wide = {name: value.expand(width, -1) for name, value in one.items()}
        scores = torch.tensor([0.0] + [-1e9] * (width - 1), dtype=torch.float64)
        for _ in range(count):
            step = subject.logits(wide, ids, mask)[:, -1].log_softmax(-1)
            total = (scores[:, None] + step).flatten()
            scores, best = total.topk(width)
            parent, token = best // step.shape[-1], best % step.shape[-1]
            ids, mask = torch.cat([ids[parent], token[:, None]], 1), torch.cat([mask, mask.new_ones(width, 1)], 1)
        found.append(ids[0])
    return torch.stack(found)
