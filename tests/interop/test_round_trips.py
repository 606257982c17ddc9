"""Adapters that PEFT makes, there and back: the same outputs, gradients, merged weights, and the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from interop.cases import CASES
from interop.round_trip import measure

WORST = 1e-10
QUICK = {("LoRA", "gpt2"), ("LoRA, rank and alpha patterns", "llama"), ("LoRA, every bias trained", "bert")}
QUICK |= {("DoRA", "gpt2"), ("(IA)3", "bert"), ("VeRA", "llama")}
ALL = [(name, family) for name, case in CASES.items() for family in case.families]
MARKED = [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in ALL]


@pytest.mark.parametrize(("name", "family"), MARKED)
def test_imported_adapter_computes_learns_merges_and_comes_back(name: str, family: str, tmp_path: Path) -> None:
    found = measure(name, family, tmp_path)
    assert found.effect > 1e-2, "the adapter changes nothing here, so equality would prove nothing"
    assert found.imported <= WORST
    assert found.gradients is None or found.gradients <= WORST
    assert found.merged is None or found.merged <= WORST
    assert found.exported <= WORST
    assert found.stored
