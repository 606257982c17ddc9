"""`peftc check` without a model: warnings, formats, the summary and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from peftc.checking.check import CheckReport, check
from peftc.cli import app
from peftc.diagnostics import MOST_SHOWN

HEAD = "peftc: 1\nname: t\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(text: str, name: str = "t.yaml") -> CheckReport:
    Path(name).write_text(text, encoding="utf-8")
    return check([name])


def told(text: str) -> list[tuple[str, str]]:
    """Codes and the text under the caret, in source order."""
    (file,) = report(text).files
    spans = [(d.code, d.span) for d in file.diagnostics]
    return [(code, span.text[span.col - 1 : span.end_col - 1] if span else "") for code, span in spans]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def test_unused_names_are_warned_of_at_their_own_place() -> None:
    text = HEAD + (
        "hyper: {r: 8, s: {default: 4.0}}\n"
        "deltas:\n"
        "  a:\n"
        "    at: ffn\n"
        "    modify: out\n"
        "    form: {args: {f: relu, p: 0.1}, params: {V: {shape: [r], init: ones}}, let: {z: x}, expr: f(W * x)}\n"
        "    params: {W: {shape: [d_out], init: zeros}, U: {shape: [1], init: ones}}\n"
        "    let: {g: mean(h)}\n"
    )
    found = [("W003", "s"), ("W004", "p"), ("W001", "V"), ("W002", "z"), ("W001", "U"), ("W002", "g")]
    assert told(text) == found


@pytest.mark.parametrize(
    "row",
    [
        "{at: ffn, modify: out, form: bottleneck}",
        "{at: ffn, modify: out, form: x * r}",
        "{at: ffn, modify: out, form: 1 * x, compose: h + r * dh}",
        "{at: ffn, modify: out, form: bottleneck, with: {r: 2 * r}}",
        "{at: ffn, modify: out, form: 1 * x, where: {if: d_ff > r}}",
        "{at: ffn, modify: out, form: W, params: {W: {shape: [r], init: zeros}}}",
        "{at: ffn, modify: out, form: W, params: {W: {shape: [1], init: constant(r)}}}",
        "{at: ffn, modify: out, form: W, params: {W: {shape: [1], init: ones, if: r > 1}}}",
        "{at: ffn, modify: out, form: dh_, let: {dh_: x * r}}",
        "{at: ffn, modify: out, form: {expr: z, let: {z: x * r}}}",
        "{at: ffn, modify: out, form: {expr: x * r, args: {r: 2}}}",
        "{at: attention, modify: heads, compose: gate, form: {attend: {keys: K, values: K}}, "
        "params: {K: {shape: [r, kv_heads, head_dim], init: zeros}}}",
    ],
)
def test_hyperparameter_that_is_read_anywhere_is_not_warned_of(row: str) -> None:
    assert "W003" not in [code for code, _ in told(f"{HEAD}hyper: {{r: 8}}\ndeltas:\n  a: {row}\n")]


def test_value_given_under_with_hides_the_hyperparameter() -> None:
    text = HEAD + "hyper: {r: 8}\ndeltas:\n  a: {at: ffn, modify: out, form: bottleneck, with: {r: 2}}\n"
    assert told(text) == [("W003", "r")]


def test_entry_of_carry_reads_hyperparameters_and_may_start_at_zero() -> None:
    text = HEAD + (
        "hyper: {w: 4, v: 2}\n"
        "carry:\n"
        "  z:\n"
        "    at: block\n"
        "    params: {A: {shape: [w, d_in], init: zeros}, S: {shape: [w], init: ones}}\n"
        "    value: linear(x, A)\n"
        "deltas:\n"
        "  read:\n"
        "   {at: block, modify: out, from: {z: z}, params: {B: {shape: [d_out, 4], init: ones}},\n"
        "    form: 'linear(z, B)'}\n"
        "tests: {t: {family: bert, identity: true}}\n"
    )
    assert told(text) == [("W003", "v"), ("W001", "S")]


def test_misspelling_is_told_once_and_not_as_an_unused_name_too() -> None:
    text = HEAD + "hyper: {scale: 8}\ndeltas:\n  a: {at: ffn, modify: out, form: 1 * x, compose: h + scal * dh}\n"
    assert told(text) == [("E008", "scal")]


def test_unknown_form_may_read_anything() -> None:
    text = HEAD + "hyper: {r: 8}\ndeltas:\n  a: {at: ffn, modify: out, form: botleneck}\n"
    assert told(text) == [("E006", "botleneck")]


def test_errors_and_warnings_of_one_file_are_told_together() -> None:
    text = HEAD + "hyper: {r: 8}\ndeltas:\n  a: {at: fn, modify: out, form: 1 * x, let: {z: qq}}\n"
    assert told(text) == [("W003", "r"), ("E005", "fn"), ("W002", "z"), ("E008", "qq")]


def test_form_file_is_checked_as_a_form() -> None:
    text = "peftc-form: 1\nname: t\nargs: {p: 0.5}\nparams: {V: {shape: [r], init: zeros}}\nlet: {z: rleu(x)}\ndh: x\n"
    assert told(text) == [("W004", "p"), ("W001", "V"), ("W002", "z"), ("E007", "rleu")]


def test_library_has_neither_errors_nor_warnings() -> None:
    folder = Path(__file__).parents[2] / "rules"
    found = check([str(path) for path in sorted(folder.rglob("*.yaml"))])
    assert [d.render() for file in found.files for d in file.diagnostics] == []


def test_missing_file_does_not_keep_the_others_from_being_checked() -> None:
    found = check(["no/such.yaml", "mam"])
    assert [[d.code for d in file.diagnostics] for file in found.files] == [["E018"], []]


def test_checking_imports_no_torch() -> None:
    code = "import sys; from peftc.checking.check import check; check(['mam']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


WRONG = HEAD + "hyper: {s: 1.0}\ndeltas:\n  a: {at: ffn, modify: ou, form: 'softmax(x, axis=1)'}\n"
UNUSED = HEAD + "hyper: {s: 1.0}\ndeltas:\n  a: {at: ffn, modify: out, form: vector}\n"


def test_exit_code_is_2_for_errors_and_0_for_warnings() -> None:
    Path("wrong.yaml").write_text(WRONG, encoding="utf-8")
    Path("unused.yaml").write_text(UNUSED, encoding="utf-8")
    wrong, unused = run("wrong.yaml", "unused.yaml", "mam"), run("unused.yaml")
    assert (wrong.exit_code, unused.exit_code) == (2, 0)
    assert wrong.stderr == "3 rules, 2 errors, 2 warnings\n"
    assert unused.stderr == "1 rule, 0 errors, 1 warning\n"
    assert unused.stdout.startswith("W003 warning: nothing reads the hyperparameter `s`\n  --> unused.yaml:3:9\n")


def test_set_values_reach_the_rules() -> None:
    assert run("mam", "--set", "r=0").exit_code == 2
    assert run("mam", "--set", "r=4").exit_code == 0


def test_json_holds_every_field_and_the_counts() -> None:
    Path("wrong.yaml").write_text(WRONG, encoding="utf-8")
    found = json.loads(run("wrong.yaml", "--format", "json").stdout)
    assert (found["errors"], found["warnings"], found["notes"]) == (2, 1, 0)
    (file,) = found["files"]
    assert file["file"] == "wrong.yaml"
    first = file["diagnostics"][1]
    assert (first["code"], first["line"], first["col"], first["end_col"]) == ("E004", 5, 24, 26)


def test_github_annotations_escape_what_would_end_them() -> None:
    Path("a,b.yaml").write_text(WRONG.replace("ou,", "'100%:',"), encoding="utf-8")
    lines = run("a,b.yaml", "--format", "github").stdout.splitlines()
    where = "file=a%2Cb.yaml,line=3,col=9,endColumn=10,title=W003"
    assert lines[0].startswith(f"::warning {where}::nothing reads the hyperparameter `s`%0A")
    assert lines[1].startswith("::error file=a%2Cb.yaml,line=5,col=24,endColumn=31,title=E004::unknown tap `100%25:`")
    assert len(lines) == 3


def test_sarif_names_tool_rules_levels_and_places() -> None:
    Path("a rule.yaml").write_text(WRONG, encoding="utf-8")
    log = json.loads(run("a rule.yaml", "no/such.yaml", "--format", "sarif").stdout)
    assert log["version"] == "2.1.0"
    (part,) = log["runs"]
    rules = [rule["id"] for rule in part["tool"]["driver"]["rules"]]
    assert rules == ["E004", "E012", "E018", "W003"]
    for result in part["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
    place = part["results"][1]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "a%20rule.yaml"
    assert place["region"] == {"startLine": 5, "startColumn": 24, "endColumn": 26}


@pytest.mark.parametrize("form", ["text", "github"])
def test_a_page_of_mistakes_is_printed_and_the_rest_counted(form: str) -> None:
    rows = "".join(f"  a{i}: {{at: fn, modify: out, form: vector}}\n" for i in range(MOST_SHOWN + 7))
    Path("many.yaml").write_text(f"{HEAD}deltas:\n{rows}", encoding="utf-8")
    result = run("many.yaml", "--format", form)
    assert result.stdout.count("unknown site") == MOST_SHOWN
    assert result.stdout.rstrip().endswith("... and 7 more")
