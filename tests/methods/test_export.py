"""Methods that stay in the graph, through `merge --export onnx`: what ONNX has no op for is computed beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from methods.harness import apply_rule, scramble, tiny
from peftc import driver


@pytest.mark.parametrize(
    ("rule", "values"), [pytest.param("loreft", {"r": 3}, marks=pytest.mark.slow), ("moe_lora", {"r": 2, "e": 3})]
)
def test_kept_method_exports(rule: str, values: dict[str, object], tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    ours = apply_rule(rule, tmp_path / "base", values)
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    ours.save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"})
    comparisons = json.loads((tmp_path / "out" / "certificate.json").read_text())["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)
