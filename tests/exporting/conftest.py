"""Tiny adapted models on disk, exported once each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families.family import BY_NAME, fill

import peftc
from peftc import driver

HYPERS: dict[str, dict[str, object]] = {"mam": {"l": 3, "r": 5, "s": 2.0}, "lora": {"r": 4}, "houlsby": {"r": 5}}


@dataclass(frozen=True)
class Export:
    """A base and a delta directory, and what was exported of them."""

    base: Path
    delta: Path
    out: Path

    @property
    def certificate(self) -> dict[str, Any]:
        return json.loads((self.out / "certificate.json").read_text())


Save = Callable[..., tuple[Path, Path]]
Make = Callable[..., Export]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Family and rule -> a base directory and a delta directory, deltas far from zero."""
    root = tmp_path_factory.mktemp("exporting")
    known: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def save(name: str, rule: str, **overrides: object) -> tuple[Path, Path]:
        key = (name, rule, str(overrides))
        if key not in known:
            base, delta = root / f"{len(known)}-base", root / f"{len(known)}-delta"
            BY_NAME[name].build(**overrides).save_pretrained(base)
            model: Any = peftc.apply(rule, base, set=HYPERS.get(rule, {}))
            fill(model)
            model.save_pretrained(delta)
            known[key] = base, delta
        return known[key]

    return save


@pytest.fixture(scope="session")
def exported(saved: Save, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The same, exported with these options of `driver.merge`."""
    root = tmp_path_factory.mktemp("exported")
    known: dict[tuple[str, ...], Export] = {}

    def make(name: str, rule: str, overrides: dict[str, object] | None = None, **options: Any) -> Export:
        key = (name, rule, str(overrides), str(options))
        if key not in known:
            base, delta = saved(name, rule, **(overrides or {}))
            known[key] = Export(base, delta, root / str(len(known)))
            driver.merge(delta, known[key].out, export={"onnx"}, **options)
        return known[key]

    return make
