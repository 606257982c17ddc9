"""Broken packages and names that two packages bring: told by the distribution's name, and only where they matter."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from extension.support import install, install_example
from peftc.checking.check import check
from peftc.cli import app
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.lang import library
from peftc.lang.loader import load_rule, parse_rule

USES = 'peftc: 1\nname: t\ndeltas:\n  a: {at: ffn, modify: out, form: "cubed(x)"}\n'
OP = 'from peftc.extension import Op\nOPS = Op("cubed", (1, 1), "x cubed", writer="broken.writers:cubed")\n'


def mistakes(text: str) -> list[Diagnostic]:
    with pytest.raises(PeftcError) as caught:
        parse_rule(text, "t.yaml")
    return [*caught.value.diagnostics]


@pytest.mark.parametrize(
    ("point", "module", "reason"),
    [
        ("broken.ops:OPS", "import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_any"),
        ("broken.ops:OPS", "1 / 0", "ZeroDivisionError: division by zero ("),
        ("broken.ops:OPS", "OPS =", "SyntaxError: invalid syntax (ops.py, line 1)"),
        ("broken.ops:OPS", "TABLE = []", "AttributeError: module 'broken.ops' has no attribute 'OPS'"),
        ("broken.ops:OPS", "OPS = {'cubed': 1}", "gives a dict, not an `Op` or a list of them"),
        ("broken.ops:OPS", "OPS = ['cubed']", "gives a str, not an `Op` or a list of them"),
        ("broken.ops", OP, 'the entry point `it = "broken.ops"` of peftc.ops is not `module:attribute`'),
        ("broken.ops:OPS", OP.replace("(1, 1)", "1"), "the op `cubed` whose arity is 1, not (least, most)"),
        ("broken.ops:OPS", OP.replace("(1, 1)", "(2, 1)"), "the op `cubed` whose arity is (2, 1)"),
        ("broken.ops:OPS", OP.replace('"cubed",', '"cu bed",'), "an op whose name is 'cu bed', which is no name"),
        ("broken.ops:OPS", OP.replace('"x cubed"', '""'), "the op `cubed` without a line of doc"),
        ("broken.ops:OPS", OP.replace("broken.writers:cubed", "broken.writers"), "not `module:function`"),
        ("broken.ops:OPS", OP.replace("writer=", "keywords=3, writer="), "whose keywords are 3, not names"),
        ("broken.ops:OPS", OP.replace("writer=", "writes="), "TypeError: Op.__init__() got an unexpected keyword"),
        (
            "broken.ops:OPS",
            OP.replace("writer=", "shapes='[n]', writer="),
            "whose shapes are '[n]', not as in `[.., n]",
        ),
        ("broken.ops:OPS", OP.replace("writer=", "shapes='[n] -> [m]', writer="), "whose shapes are '[n] -> [m]', not"),
        ("broken.ops:OPS", OP.replace("writer=", "shapes='[n], [n] -> [n]', writer="), "whose shapes are '[n], [n] ->"),
    ],
    ids=range(17),
)
def test_broken_table_of_ops_is_told_where_an_op_is_missing(point: str, module: str, reason: str, site: Path) -> None:
    files = {"broken/__init__.py": "", "broken/ops.py": module}
    install(site, "peftc-broken", "2.0", {"peftc.ops": f"it = {point}"}, files)
    package, missing = mistakes(USES)
    assert (missing.code, str(missing.span)) == ("E007", "t.yaml:4:36")
    assert (package.code, package.span) == ("E045", None)
    assert package.message.startswith("the package `peftc-broken 2.0` cannot be used: ") and reason in package.message
    assert load_rule("houlsby", {"f": "gelu"}).name == "houlsby"


def test_broken_package_is_told_once_for_many_missing_ops(site: Path) -> None:
    install(site, "peftc-broken", "2.0", {"peftc.ops": "it = broken.ops:OPS"}, {"broken/__init__.py": "1 / 0"})
    text = USES.replace("cubed(x)", "cubed(x) + quarted(x)") + '  b: {at: ffn, modify: out, form: "cubed(x)"}\n'
    assert [d.code for d in mistakes(text)] == ["E045", "E007", "E007", "E007"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("single", "ImportError: `single` is a module, not a package with a folder of its own"),
        ("broken:RULES", 'the entry point `it = "broken:RULES"` of peftc.rules does not name a package'),
    ],
)
def test_broken_package_of_rules_is_told_where_a_rule_or_form_is_missing(value: str, reason: str, site: Path) -> None:
    install(site, "peftc-broken", "2.0", {"peftc.rules": f"it = {value}"}, {"single.py": ""})
    with pytest.raises(PeftcError) as caught:
        load_rule("nonesuch")
    assert [d.code for d in caught.value.diagnostics] == ["E018", "E045"]
    assert reason in caught.value.diagnostics[1].message
    found = mistakes("peftc: 1\nname: t\ndeltas:\n  a: {at: ffn, modify: out, form: nonesuch}\n")
    assert [d.code for d in found] == ["E045", "E006"]
    assert check(["mam", "lora"]).summary == "2 rules, 0 errors, 0 warnings"


def test_listings_show_the_rest_tell_the_broken_ones_and_end_with_2(site: Path) -> None:
    rule = "peftc: 1\nname: bad\nhyper: {r: 0}\ndeltas:\n  a: {at: ffn, modify: out, form: bottleneck}\n"
    files = {"broken/__init__.py": "", "broken/bad.yaml": rule, "broken/tables.py": "1 / 0"}
    files["broken/patterns/bad.yaml"] = "peftc-pattern: 1\nname: bad\nmatch: ['out = lnear(x, W)']\n"
    points = {"peftc.rules": "it = broken", "peftc.ops": "it = broken.tables:OPS"}
    install(site, "peftc-broken", "2.0", points, files)
    for command, code in (("rules", "E014"), ("ops", "E045"), ("patterns", "E007")):
        result = CliRunner().invoke(app, [command, "--json"])
        assert result.exit_code == 2
        assert len(json.loads(result.stdout)) > 2
        assert f"{code} error: " in result.stderr


def test_rule_file_that_is_not_text_is_a_mistake_of_the_file(site: Path) -> None:
    install(site, "peftc-broken", "2.0", {"peftc.rules": "it = broken"}, {"broken/__init__.py": ""})
    (site / "broken" / "bad.yaml").write_bytes(b"peftc: 1\nname: \xff\n")
    with pytest.raises(PeftcError, match="the file is not UTF-8"):
        load_rule("bad")


def test_package_in_a_zip_file_serves_and_is_held_to_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_example(tmp_path / "site")
    (tmp_path / "site" / "peftc_squared" / "bad.yaml").write_bytes(b"peftc: 1\nname: \xff\n")
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", tmp_path / "site")
    monkeypatch.syspath_prepend(archive)
    library.forget()
    try:
        assert check(["squared_adapter"]).summary == "1 rule, 0 errors, 0 warnings"
        assert [d.code for d in check(["bad"]).files[0].diagnostics] == ["E001"]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "peftc_squared"]:
            del sys.modules[name]
        monkeypatch.undo()
        library.forget()


def test_name_of_the_library_in_a_package_is_an_error_that_names_both(site: Path) -> None:
    form = "peftc-form: 1\nname: bottleneck\ndh: x\n"
    rule = "peftc: 1\nname: mam\ntrain: ['*']\n"
    files = {"more/__init__.py": "", "more/mam.yaml": rule, "more/forms/bottleneck.yaml": form}
    files["more/ops.py"] = OP.replace("cubed", "relu")
    install(site, "peftc-more", "1.0", {"peftc.rules": "it = more", "peftc.ops": "it = more.ops:OPS"}, files)
    (found,) = check(["mam"]).files[0].diagnostics
    assert (found.code, found.message) == (
        "E046",
        "the rule `mam` is in more than one package: peftc, peftc-more 1.0",
    )
    (found,) = mistakes("peftc: 1\nname: t\nhyper: {r: 8}\ndeltas:\n  a: {at: ffn, modify: out, form: bottleneck}\n")
    assert (found.code, str(found.span)) == ("E046", "t.yaml:5:35")
    assert found.message == "the form `bottleneck` is in more than one package: peftc, peftc-more 1.0"
    (found,) = mistakes(USES.replace("cubed(x)", "relu(x)"))
    assert (found.code, str(found.span)) == ("E046", "t.yaml:4:36")
    assert found.message == "the op `relu` is in more than one package: peftc, peftc-more 1.0"
    assert {d.code for d in check(["houlsby"]).files[0].diagnostics} == {"E046"}
    assert load_rule("lora").name == "lora"


def test_word_that_names_an_op_of_two_packages_is_an_error(site: Path) -> None:
    for name in ("one", "two"):
        files = {f"{name}/__init__.py": OP}
        install(site, f"peftc-{name}", "1.0", {"peftc.ops": f"it = {name}:OPS"}, files)
    with pytest.raises(PeftcError, match=r"`cubed` is in more than one package: peftc-one 1.0, peftc-two 1.0"):
        load_rule("houlsby", {"f": "cubed"})


def test_two_entry_points_to_one_thing_are_no_clash(site: Path) -> None:
    install_example(site)
    info = next(site.glob("*.dist-info")) / "entry_points.txt"
    text = info.read_text(encoding="utf-8")
    again = text.replace("squared =", "again =")
    info.write_text(text + again.split("[peftc.ops]")[0].replace("[peftc.rules]", "[peftc.rules]"), encoding="utf-8")
    assert check(["squared_adapter"]).errors == 0


@pytest.mark.parametrize(
    ("writer", "reason"),
    [
        ("import not_installed_anywhere", "ModuleNotFoundError"),
        ("cubed = 3", "the writer `broken.writers:cubed` of the op `cubed` is not a function"),
        ("def cubed(builder, x):\n    return nothing", "the writer of `cubed` raised NameError: name 'nothing' is not"),
        ("def cubed(builder, x):\n    return 3", "the writer of `cubed` gives a int, not a node of the graph"),
    ],
    ids=["import", "type", "raises", "result"],
)
def test_broken_writer_is_told_by_its_package(writer: str, reason: str, site: Path) -> None:
    from peftc.lang.op_writers import write_op

    broken_writer(site, writer)
    with pytest.raises(PeftcError) as caught:
        write_op("cubed", None, None)  # pyright: ignore[reportArgumentType] -- none of the writers gets to it
    (found,) = caught.value.diagnostics
    assert found.code == "E045"
    assert found.message.startswith("the package `peftc-broken 2.0` cannot be used: ") and reason in found.message


def test_broken_writer_is_told_at_the_call(site: Path, tmp_path: Path) -> None:
    from methods.harness import tiny

    broken_writer(site, "def cubed(builder, x):\n    return {}['three']")
    tiny("bert").save_pretrained(tmp_path / "base")
    (tmp_path / "t.yaml").write_text(USES, encoding="utf-8")
    told = check([str(tmp_path / "t.yaml")], model=tmp_path / "base").files[0].diagnostics
    (found,) = [diagnostic for diagnostic in told if diagnostic.severity == "error"]
    assert (found.code, found.span.col if found.span else 0) == ("E045", 36)
    assert "the writer of `cubed` raised KeyError: 'three' (" in found.message


def broken_writer(site: Path, text: str) -> None:
    files = {"broken/__init__.py": "", "broken/ops.py": OP, "broken/writers.py": text}
    install(site, "peftc-broken", "2.0", {"peftc.ops": "it = broken.ops:OPS"}, files)
