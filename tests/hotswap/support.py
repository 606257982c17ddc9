"""Delta directories with random values, and what torch answers for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from fold.support import VOCABULARY

import peftc

Arrays = dict[str, np.ndarray]


def delta(rule: str | Path, base: Path, directory: Path, hyper: Mapping[str, object] = {}) -> Path:
    """Apply a rule, move every delta off its start, and save."""
    model = peftc.apply(rule, base, set=dict(hyper))
    generator = torch.Generator().manual_seed(crc32(directory.name.encode()))
    with torch.no_grad():
        for name in sorted(model.surgery.plan.parameters):
            parameter = model.get_parameter(name)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def batch(rows: int, length: int, names: tuple[str, ...], *, seed: int = 0) -> Arrays:
    """Random ids, without padding."""
    generator = np.random.default_rng(seed)
    made = {"input_ids": generator.integers(3, VOCABULARY, (rows, length))}
    made["attention_mask"] = np.ones_like(made["input_ids"])
    made["position_ids"] = np.arange(length)[None].repeat(rows, 0)
    return {name: made[name] for name in names}


def answer(model: Any, inputs: Arrays) -> np.ndarray:
    """The first output of a torch model."""
    extra = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, **extra)[0].numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
