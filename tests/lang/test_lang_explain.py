"""`peftc explain`: every code that is raised has an entry, and its examples are what they say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftc.checking.check import check
from peftc.cli import app
from peftc.lang.grammar import STATIC_CALLS
from peftc.lang.ops import INIT_OPS, INITS, OPS
from peftc.reference.explain import ENTRIES, Entry

ROOT = Path(__file__).parents[2]
RULES = [code for code, entry in ENTRIES.items() if entry.example == "rule"]
FOR_A_MODEL = [code for code, entry in ENTRIES.items() if entry.example == "model"]


def raised_codes() -> set[str]:
    """Every code literal in the source."""
    codes: set[str] = set()
    for file in [*(ROOT / "peftc").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(r"[EW]\d{3}", str(node.value)):
                codes.add(str(node.value))
    return codes


def codes_of(text: str, tmp_path: Path, model: Path | None = None) -> list[str]:
    file = tmp_path / "t.yaml"
    file.write_text(text, encoding="utf-8")
    (checked,) = check([str(file)], model=model).files
    return [d.code for d in checked.diagnostics]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny BERT whose activation is gelu."""
    from transformers import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=99, **sizes)).save_pretrained(directory)
    return directory


def test_every_code_that_is_raised_is_explained_and_no_other() -> None:
    assert raised_codes() == set(ENTRIES)
    assert list(ENTRIES) == sorted(ENTRIES)


@pytest.mark.parametrize("code", RULES)
def test_wrong_example_is_told_with_its_code_and_the_right_one_is_clean(code: str, tmp_path: Path) -> None:
    entry = ENTRIES[code]
    assert set(codes_of(entry.wrong, tmp_path)) == {code}
    assert codes_of(entry.right, tmp_path) == []


@pytest.mark.parametrize("code", FOR_A_MODEL)
def test_wrong_example_is_told_with_its_code_by_a_model(code: str, tmp_path: Path, bert: Path) -> None:
    entry = ENTRIES[code]
    assert codes_of(entry.wrong, tmp_path) == []
    assert code in codes_of(entry.wrong, tmp_path, bert)
    rest = codes_of(entry.right, tmp_path, bert)
    assert code not in rest
    assert not [other for other in rest if other.startswith("E")]


@pytest.mark.parametrize("code", ["E015", "E018", "E044"])
def test_wrong_command_is_told_with_its_code_and_the_right_one_runs(code: str) -> None:
    entry = ENTRIES[code]
    wrong = CliRunner().invoke(app, entry.wrong.split()[1:])
    assert wrong.exit_code == 2
    assert code in wrong.output
    assert CliRunner().invoke(app, entry.right.split()[1:]).exit_code == 0


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_entry_is_complete_and_fits_a_terminal(entry: Entry) -> None:
    assert entry.title[0] != entry.title[0].upper() or not entry.title[0].isalpha() or entry.title.startswith("NaN")
    assert not entry.title.endswith(".")
    assert entry.example in ("rule", "model", "command")
    assert entry.wrong != entry.right
    assert all(len(line) <= 120 for line in entry.render().splitlines())


def test_explain_prints_the_long_form_in_either_case() -> None:
    result = CliRunner().invoke(app, ["explain", "e012"])
    assert result.output == f"{ENTRIES['E012'].render()}\n"
    assert "Wrong:" in result.output


def test_explain_alone_lists_the_codes() -> None:
    lines = CliRunner().invoke(app, ["explain"]).output.splitlines()
    assert [line.split()[0] for line in lines] == list(ENTRIES)


@pytest.mark.parametrize(
    ("code", "help"), [("E0122", "did you mean `E0"), ("hello", "`peftc explain` lists the codes")]
)
def test_unknown_code_is_told_with_a_near_one(code: str, help: str) -> None:
    result = CliRunner().invoke(app, ["explain", code])
    assert result.exit_code == 2
    assert help in result.stderr


def test_ops_lists_every_op_and_initial_value() -> None:
    lines = CliRunner().invoke(app, ["ops"]).output.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == [*OPS, *STATIC_CALLS, *INITS, *INIT_OPS]
    found = json.loads(CliRunner().invoke(app, ["ops", "--json"]).output)
    linear = {"name": "linear", "arity": [2, 3], "doc": OPS["linear"].doc, "keywords": [], "from": "peftc"}
    assert found["ops"][0] == {**linear, "shapes": "[.., i], [o, i], [o] -> [.., o]"}
    assert [op["name"] for op in found["inits"]] == list(INITS)
