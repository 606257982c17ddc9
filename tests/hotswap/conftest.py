"""One BERT with five adapters of three structures, exported once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fold.support import tiny
from transformers import AutoModel

import peftc
from hotswap.support import delta
from peftc import driver

ADAPTERS: dict[str, tuple[str, dict[str, object]]] = {
    "narrow": ("lora", {"r": 1}),
    "wide": ("lora", {"r": 5, "alpha": 3.0}),
    "rs": ("rslora", {"r": 3}),
    "houlsby": ("houlsby", {"r": 4}),
    "mam": ("mam", {"r": 6, "l": 3}),
}


@dataclass(frozen=True, slots=True)
class Served:
    """An exported directory, the base it is of, and its delta directories by name."""

    directory: Path
    base: Path
    deltas: dict[str, Path]
    report: Any

    def torch(self, name: str | None) -> Any:
        """What an adapter, or the base, is in torch."""
        return peftc.load(self.deltas[name]) if name is not None else AutoModel.from_pretrained(self.base).eval()


def export(root: Path, family: str, adapters: dict[str, tuple[str, dict[str, object]]]) -> Served:
    base = root / "base"
    tiny(family).to(torch.float32).save_pretrained(base)
    deltas = {name: delta(rule, base, root / name, hyper) for name, (rule, hyper) in adapters.items()}
    report = driver.export_adapters(list(deltas.values()), root / "served")
    return Served(root / "served", base, deltas, report)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return export(tmp_path_factory.mktemp("hotswap"), "bert", ADAPTERS)
