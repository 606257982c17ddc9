"""Checkpoints are written once a session; what is merged goes to each test's own directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fold.support import tiny

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The directory of a tiny random model, by family and dtype."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float64) -> Path:
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp(family) / "base"
            tiny(family).to(dtype).save_pretrained(directory)
            made[family, dtype] = directory
        return made[family, dtype]

    return make
