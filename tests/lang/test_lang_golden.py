"""Every bad rule of golden/ is told in the words beside it; PEFTC_REGOLD=1 writes those words anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftc.diagnostics import PeftcError
from peftc.lang.loader import parse_rule

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*.yaml"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_bad_rule_is_told_in_these_words(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)  # what a rule takes from is found beside it
    with pytest.raises(PeftcError) as raised:
        parse_rule(path.read_text(encoding="utf-8"), f"{path.stem}.yaml")
    told = f"{raised.value}\n"
    expected = path.with_suffix(".txt")
    if os.environ.get("PEFTC_REGOLD"):
        expected.write_text(told, encoding="utf-8")
    assert told == expected.read_text(encoding="utf-8")


def test_every_code_of_the_language_has_a_golden() -> None:
    told = "\n".join(path.read_text(encoding="utf-8") for path in GOLDEN.glob("*.txt"))
    codes = {"E001", "E002", "E003", "E004", "E005", "E006", "E007", "E008", "E009", "E010", "E011", "E012", "E014"}
    codes |= {"E016", "E017", "E018", "E019", "E023", "E024", "E050"}
    assert {code for code in codes if f"{code} error" not in told} == set()
