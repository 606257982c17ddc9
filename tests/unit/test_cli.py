"""What the command line promises: instant help, diagnostics on stderr, one exit code for each kind of end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

import peftc
from peftc.cli import app, parse_sets
from peftc.diagnostics import Diagnostic, PeftcError

COMMANDS = ["apply", "merge", "sites", "plan", "rules", "check", "explain", "ops", "patterns", "schema"]
HEAVY = ["torch", "transformers", "onnx", "numpy", "networkx", "pydantic"]


class FakeReport:
    def to_json(self) -> dict[str, object]:
        return {"sites": 12}

    def render(self, console: Console) -> None:
        console.print("twelve sites")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver that records how it is called; `raises` makes every call end with that exception."""
    calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []
    fake = SimpleNamespace(calls=calls, raises=None)
    module = ModuleType("peftc.driver")

    def record(name: str):
        def call(*args: object, **kwargs: object) -> FakeReport:
            calls.append((name, args, kwargs))
            if fake.raises is not None:
                raise fake.raises
            return FakeReport()

        return call

    for name in ("apply", "merge", "sites", "plan"):
        setattr(module, name, record(name))
    monkeypatch.setitem(sys.modules, "peftc.driver", module)
    monkeypatch.setattr(peftc, "driver", module, raising=False)
    return fake


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from peftc.cli import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_peftc_imports_no_heavy_package() -> None:
    code = f"import sys, peftc; dir(peftc); assert not set({HEAVY!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute_of_peftc_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = peftc.aply


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: peftc {command}" in " ".join(result.output.split())


def test_version_is_printed() -> None:
    assert run("--version").output.strip() == f"peftc {peftc.__version__}"


def test_apply_passes_every_option_to_the_driver(driver: SimpleNamespace) -> None:
    result = run("apply", "mam", "model", "-o", "out", "--set", "r=64", "--set", "f = gelu", "--seed", "3")
    assert result.exit_code == 0, result.output
    (name, args, kwargs) = driver.calls[0]
    assert (name, args) == ("apply", ("mam", Path("model"), Path("out")))
    assert kwargs["sets"] == {"r": "64", "f": "gelu"}
    assert (kwargs["seed"], kwargs["head"], kwargs["num_labels"]) == (3, None, None)
    assert "twelve sites" in result.output


def test_merge_defaults_to_a_transformers_checkpoint(driver: SimpleNamespace) -> None:
    assert run("merge").exit_code == 0
    (_, args, kwargs) = driver.calls[0]
    assert args == (Path("peftc-out"), Path("merged"))
    assert (kwargs["export"], kwargs["base"]) == ({"hf"}, None)


def test_merge_collects_the_formats_to_export(driver: SimpleNamespace) -> None:
    assert run("merge", "--export", "onnx", "--export", "hf").exit_code == 0
    assert driver.calls[0][2]["export"] == {"hf", "onnx"}


@pytest.mark.parametrize("arguments", [["sites", "model"], ["plan", "mam", "model"]])
def test_reading_commands_print_json(driver: SimpleNamespace, arguments: list[str]) -> None:
    assert json.loads(run(*arguments, "--json").stdout) == {"sites": 12}


def test_users_mistake_is_told_on_stderr_with_exit_code_2(driver: SimpleNamespace) -> None:
    driver.raises = PeftcError([Diagnostic("E030", "not a model directory", help="it has no config.json")])
    result = run("sites", "model")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "E030 error: not a model directory\n   = help: it has no config.json\n"


def test_brackets_in_a_diagnostic_are_printed_as_they_are(driver: SimpleNamespace) -> None:
    driver.raises = PeftcError([Diagnostic("E013", "shapes [r, d_in] and [bold] differ")])
    assert "shapes [r, d_in] and [bold] differ" in run("sites", "model").stderr


def test_failed_parity_has_its_own_exit_code(driver: SimpleNamespace) -> None:
    driver.raises = PeftcError([Diagnostic("E039", "outputs differ by 0.1")])
    assert run("merge").exit_code == 3


def test_interrupt_is_one_line_and_exit_code_130(driver: SimpleNamespace) -> None:
    driver.raises = KeyboardInterrupt()
    result = run("merge")
    assert result.exit_code == 130
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_bug_keeps_its_traceback(driver: SimpleNamespace) -> None:
    driver.raises = ZeroDivisionError("a bug")
    assert isinstance(run("sites", "model").exception, ZeroDivisionError)


@pytest.mark.parametrize("text", ["r", "=64", "r=", ""])
def test_set_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(PeftcError, match="E014"):
        parse_sets([text])


def test_set_keeps_everything_after_the_first_equals_sign() -> None:
    assert parse_sets(["init=a=b", "r=1", "r=2"]) == {"init": "a=b", "r": "2"}


def test_rules_prints_one_line_for_each_rule_of_the_library() -> None:
    names = [rule["name"] for rule in json.loads(run("rules", "--json").stdout)]
    assert "mam" in names
    lines = run("rules").stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == names
    assert not any("…" in line for line in lines)
