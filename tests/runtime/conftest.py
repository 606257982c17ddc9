"""Tiny random models on disk, plain and adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from runtime.tiny import MAKERS


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> the directory of a tiny model; made on first use."""
    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = MAKERS[name]()
                for parameter in model.parameters():  # biases are not 0, attention is not uniform
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
                model.save_pretrained(root / name)
        return root / name

    return directory


@pytest.fixture(scope="session")
def plain(model_dir: Callable[[str], Path]) -> Callable[[str], Any]:
    """Name -> the model as transformers loads it, without a cache in its answers."""

    def load(name: str) -> Any:
        cls = type(MAKERS[name]())
        model = cls.from_pretrained(model_dir(name)).eval()
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model

    return load


@pytest.fixture(scope="session")
def adapted(model_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """Name and rule -> the adapted model; one for the session, so nobody may train it."""
    made: dict[tuple[Any, ...], Any] = {}

    def apply(name: str, rule: str = "lora", **options: Any) -> Any:
        key = (name, rule, str(options))
        if key not in made:
            made[key] = peftc.apply(rule, model_dir(name), **options)
        return made[key]

    return apply


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process: FSDP2 shards and gathers as in any group."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
