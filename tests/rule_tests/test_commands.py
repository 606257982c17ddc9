"""`peftc test` and the pytest plugin: exit codes, formats, places, and nothing collected that was not asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from peftc.cli import app

RULE = """peftc: 1
name: mine
deltas:
  low: {at: attention, modify: [q, v], form: low_rank, with: {r: 4}}
tests:
  counts: {family: [bert, vit], sites: [2, 3]}
  folds: {family: bert, fold: merged}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.yaml").write_text(RULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["test", *arguments])


def test_text_names_the_place_what_is_said_and_what_is_found(place: Path) -> None:
    result = run("mine.yaml")
    assert result.exit_code == 1
    assert "mine.yaml             2 validated, 1 missing" in result.stdout
    assert "E060 error: missing: test `counts[vit]` says 3 sites of `low`" in result.stdout
    assert "--> mine.yaml:6:44" in result.stdout
    assert "= help: found: 2 sites" in result.stdout
    assert result.stderr.strip() == "3 tests of 1 rule: 2 validated, 1 missing"


def test_exit_codes_tell_success_failure_and_mistakes_apart(place: Path) -> None:
    assert run("mine.yaml", "-k", "folds").exit_code == 0
    assert run("mine.yaml", "-k", "MINE::counts[bert]").exit_code == 0
    assert run("mine.yaml", "-k", "vit").exit_code == 1
    assert run("mine.yaml", "-k", "nothing").exit_code == 2
    (place / "wrong.yaml").write_text(RULE.replace("bert", "brt"), encoding="utf-8")
    both = run("wrong.yaml", "mine.yaml")
    assert both.exit_code == 2
    assert "E061 error: unknown family `brt`" in both.stdout
    assert "1 missing" in both.stdout  # the other rule was tested all the same
    (place / "none.yaml").write_text(RULE.partition("tests:")[0], encoding="utf-8")
    untested = run("none.yaml")
    assert (untested.exit_code, untested.stderr.strip()) == (0, "0 tests of 1 rule: 1 untested")


def test_json_holds_every_test_and_the_place_of_what_does_not_hold(place: Path) -> None:
    found = json.loads(run("mine.yaml", "--format", "json").stdout)
    assert (found["validated"], found["missing"], found["mistakes"]) == (2, 1, [])
    assert [test["test"] for test in found["tests"]] == ["counts[bert]", "counts[vit]", "folds[bert]"]
    (finding,) = found["tests"][1]["findings"]
    expected = {"outcome": "missing", "expectation": "sites.low", "expected": "3 sites of `low`", "found": "2 sites"}
    assert finding == {**expected, "file": "mine.yaml", "line": 6, "col": 44}


def test_junit_is_read_by_what_reads_junit(place: Path) -> None:
    (place / "wrong.yaml").write_text("peftc: 1\nname: wrong\n", encoding="utf-8")
    root = ElementTree.fromstring(run("mine.yaml", "wrong.yaml", "--format", "junit").stdout)
    first, second = root
    assert (first.attrib["tests"], first.attrib["failures"], first.attrib["errors"]) == ("3", "1", "0")
    failure = first.find("testcase[@name='counts[vit]']/failure")
    assert failure.attrib["type"] == "missing"
    assert "mine.yaml:6:44" in failure.text
    assert second.find("testcase/error").attrib["type"] == "E010"


def collected(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with the plugin as an installation has it."""
    plugin = ["-p", "no:peftc", "-p", "peftc.pytest_plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugin, *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)


NO_TORCH = (
    "import sys\n\ndef pytest_collection_finish(session):\n    assert not {'torch', 'transformers'} & {*sys.modules}\n"
)


def test_plugin_collects_where_it_is_asked_to_and_without_torch(place: Path) -> None:
    (place / "conftest.py").write_text(NO_TORCH, encoding="utf-8")
    (place / "other.yaml").write_text("tests:\n  - peftc\n", encoding="utf-8")
    names = ["mine.yaml::counts[bert]", "mine.yaml::counts[vit]", "mine.yaml::folds[bert]"]
    asked = ["--collect-only", "-q"]
    assert "no tests collected" in collected(place, *asked).stdout
    for arguments in (["mine.yaml"], ["--peftc-rules"], ["-o", "peftc_rules=true", "."]):
        result = collected(place, *asked, *arguments)
        assert result.stdout.split("\n\n")[0].split() == names, result.stdout + result.stderr


def test_plugin_reports_a_test_that_does_not_hold_at_its_place(place: Path) -> None:
    (place / "wrong.yaml").write_text(RULE.replace("low_rank", "low_rnk"), encoding="utf-8")
    result = collected(place, "-q", "mine.yaml", "wrong.yaml", "--continue-on-collection-errors")
    assert result.returncode == 1
    assert "E060 error: missing: test `counts[vit]` says 3 sites of `low`" in result.stdout
    assert "--> mine.yaml:6:44" in result.stdout
    assert "E006 error: unknown form `low_rnk`" in result.stdout
    assert "1 failed, 2 passed, 1 error" in result.stdout
