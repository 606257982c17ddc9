"""A pytest plugin: each test inside a rule is a test of the run.

    pytest rules/mine.yaml            # a file that is named on the command line
    pytest --peftc-rules              # every rule file with `tests:` below the paths of the run
    peftc_rules = true                # the same, in the ini file

Without one of these nothing is collected. The plugin is loaded in every run of pytest where peftc is installed, so
nothing heavy is imported before a rule is: no torch until a test of a rule runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peftc.checking.rule_tests import Result
    from peftc.lang.rule import Case

_HEADER = re.compile(rb"^peftc:[ \t]*1[ \t\r]*(#.*)?$", re.MULTILINE)
_TESTS = re.compile(rb"^tests:", re.MULTILINE)
_HEAD, _MOST = 4096, 1 << 20
"""Bytes of a file that are looked at: the header stands in its first lines, and no rule is longer."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftc")
    group.addoption("--peftc-rules", action="store_true", help="collect the tests inside peftc rules (*.yaml)")
    parser.addini("peftc_rules", "collect the tests inside peftc rules (*.yaml)", type="bool", default=False)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> RuleFile | None:
    if file_path.suffix not in (".yaml", ".yml"):
        return None
    config = parent.config
    wanted = config.getoption("peftc_rules") or config.getini("peftc_rules") or parent.session.isinitpath(file_path)
    return RuleFile.from_parent(parent, path=file_path) if wanted and holds_tests(file_path) else None


def holds_tests(path: Path) -> bool:
    """Whether a file looks like a rule with tests; what cannot be read is no such file."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST)
    except OSError:
        return False
    return bool(_HEADER.search(text[:_HEAD]) and _TESTS.search(text))


class RuleFile(pytest.File):
    """A rule file; its items are its tests, one for each family."""

    def collect(self) -> Iterator[RuleTest]:
        from peftc.lang.loader import load_rule

        below = self.path.is_relative_to(Path.cwd())
        for case in load_rule(self.path.relative_to(Path.cwd()) if below else self.path).tests:
            yield RuleTest.from_parent(self, name=case.label, case=case)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
        from peftc.diagnostics import PeftcError

        error = excinfo.value
        return str(error) if isinstance(error, PeftcError) else super().repr_failure(excinfo)


class RuleTest(pytest.Item):
    """One test of a rule on one family."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case

    def runtest(self) -> None:
        from peftc.checking.rule_tests import run_case

        result = run_case(str(self.path), self.case)
        if result.findings:
            raise RuleTestError(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if not isinstance(excinfo.value, RuleTestError):
            return super().repr_failure(excinfo, style)
        from peftc.checking.rule_test_formats import diagnostics

        return "\n\n".join(told.render() for told in diagnostics(excinfo.value.result))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        line = self.case.span.line - 1 if self.case.span else None
        return self.path, line, self.name


class RuleTestError(Exception):
    """A test of a rule that does not hold."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.outcome)
        self.result = result
