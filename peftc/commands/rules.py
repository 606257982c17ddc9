"""Commands about the rule language itself and what it reaches: check, test, explain, ops, families, schema. None
needs a model directory or writes a file.

$ peftc check mine.yaml
"""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftc.diagnostics import MOST_SHOWN, Diagnostic, and_more

if TYPE_CHECKING:
    from peftc.checking.rule_tests import Result
    from peftc.lang.ops import Op

TEST_FAILED = 1

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


class Format(str, Enum):
    """How `check` writes what it found."""

    text = "text"
    json = "json"
    github = "github"
    sarif = "sarif"


class FileKind(str, Enum):
    """The kinds of files that have a schema."""

    rule = "rule"
    form = "form"
    pattern = "pattern"


def check(
    rules: Annotated[list[str], typer.Argument(metavar="RULE...", help="Rule or form files, or names of the library.")],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Check against this model directory as well.")
    ] = None,
    head: Annotated[str | None, typer.Option("--head", metavar="HEAD", help="The model's class; see `apply`.")] = None,
    num_labels: Annotated[int | None, typer.Option("--num-labels", min=1, help="Classes of a new head.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a hyperparameter of each rule; may be repeated."),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print what is found.")] = Format.text,
) -> None:
    """Tell every mistake of rule files at once, and what they declare but do not use. Exit code 2 for mistakes."""
    from peftc.checking import check_formats
    from peftc.checking.check import check as run
    from peftc.cli import USER_ERROR, parse_sets

    report = run(rules, parse_sets(sets), model=model, head=head, num_labels=num_labels)
    if form is Format.text:
        blocks = [file.diagnostics for file in report.files if file.diagnostics]
        for position, diagnostics in enumerate(blocks):
            print_diagnostics(diagnostics, stderr=False, apart=position > 0)
    else:
        write = {"json": check_formats.as_json, "github": check_formats.as_github, "sarif": check_formats.as_sarif}
        text = write[form.value](report)
        if text:
            typer.echo(text)
    typer.echo(report.summary, err=True)
    if report.errors:
        raise typer.Exit(USER_ERROR)


class TestFormat(str, Enum):
    """How `test` writes what came of the tests."""

    text = "text"
    json = "json"
    junit = "junit"


def test(
    rules: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RULE]...", help="Rule files, or names of the library; without one, the library."),
    ] = None,
    wanted: Annotated[
        str, typer.Option("-k", metavar="WORD", help="Only tests whose `rule::test[family]` holds this word.")
    ] = "",
    form: Annotated[TestFormat, typer.Option("--format", help="How to print the results.")] = TestFormat.text,
) -> None:
    """Run the tests that rules hold, on built-in tiny models. Exit code 1 if one does not hold, 2 for mistakes."""
    from peftc.checking import rule_test_formats as formats
    from peftc.cli import USER_ERROR
    from peftc.diagnostics import PeftcError, fail
    from peftc.lang.library import rule_files
    from peftc.lang.loader import load_rule

    found: list[Result] = []
    mistakes: list[Diagnostic] = []
    for name in rules or sorted(rule_files()):
        try:
            rule = load_rule(name)
        except PeftcError as error:
            mistakes += error.diagnostics
            continue
        from peftc.checking.rule_tests import run_tests  # after the rule is read: it takes torch

        results = list(run_tests(rule, name, wanted=wanted))
        found += results
        if form is TestFormat.text and results:
            typer.echo(f"{name:<20}  {formats.summary(results).partition(': ')[2]}")
            for result in results:
                print_diagnostics(tuple(formats.diagnostics(result)), stderr=False)
    if not found and not mistakes:
        fail("E061", f"`-k {wanted}` selects no test", help="tests are called `rule::test[family]`")
    if form is TestFormat.text:
        print_diagnostics(tuple(mistakes), stderr=False)
    else:
        write = {"json": formats.as_json, "junit": formats.as_junit}[form.value]
        typer.echo(write(found, mistakes))
    typer.echo(formats.summary(found), err=True)
    if mistakes:
        raise typer.Exit(USER_ERROR)
    if any(result.findings for result in found):
        raise typer.Exit(TEST_FAILED)


def explain(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", help="A code, such as E012 or W001.")] = None,
) -> None:
    """Explain a code with a wrong and a right example; without one, list the codes."""
    from peftc.reference.explain import ENTRIES
    from peftc.reference.explain import explain as find

    if code is not None:
        typer.echo(find(code).render())
        return
    for entry in ENTRIES.values():
        typer.echo(f"{entry.code}  {entry.title}")


def ops(as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
    """List what expressions can call: ops for tensors, functions for sizes, and values for `init`."""
    from peftc.lang.arguments import count
    from peftc.lang.extensions import LIBRARY, extension_ops
    from peftc.lang.grammar import STATIC_CALLS
    from peftc.lang.op_shapes import shapes_of
    from peftc.lang.ops import INIT_OPS, INITS, OPS

    tables = {"ops": OPS, "sizes": STATIC_CALLS, "inits": INITS, "init_ops": INIT_OPS}
    extra = extension_ops()
    origins = {name: extra.origin(name) for name in extra.items}
    if as_json:
        found = {
            kind: [{**_described(op), "from": origins.get(op.name, LIBRARY)} for op in table.values()]
            for kind, table in tables.items()
        }
        found["ops"] = [{**op, "shapes": shapes_of(str(op["name"]))} for op in found["ops"]]
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        end_with([*extra.problems, *extra.clashes("op")])
        return
    width = max(len(name) for table in tables.values() for name in table)
    shapes = max(len(text) for text in map(shapes_of, OPS))
    titles = {
        "ops": "Ops, in `form`, `compose` and `let`",
        "sizes": "In sizes and conditions",
        "inits": "In `init`, in the shape of the parameter",
        "init_ops": "In `init`, over `weight`, `h` and parameters above, beside the ops",
    }
    for position, (kind, table) in enumerate(tables.items()):
        typer.echo(("\n" if position else "") + f"{titles[kind]}:\n")
        for op in table.values():
            arguments = count(op).removesuffix("s").removesuffix(" argument") if op.arity[1] else "-"
            keywords = f" [{', '.join(op.keywords)}]" if op.keywords else ""
            origin = f" ({origins[op.name]})" if kind == "ops" and op.name in origins else ""
            takes = f"  {shapes_of(op.name):<{shapes}}" if kind == "ops" else ""
            typer.echo(f"  {op.name:<{width}}  {arguments + keywords:<12}{takes}  {op.doc}{origin}")
    typer.echo(f"\n{_DTYPES}")
    end_with([*extra.problems, *extra.clashes("op")])


_DTYPES = """\
A form computes in the widest dtype of the row's parameters, float32 where none has a `dtype:` of its own (float64 on
such a base), and what it reads of the base is cast to that once. `compose` computes in the wider one of that and the
dtype of h, and its value is cast back to the dtype of h, once."""


def _described(op: Op) -> dict[str, object]:
    return {key: value for key, value in asdict(op).items() if key not in ("writer", "shapes")}


def patterns(
    ops: Annotated[bool, typer.Option("--ops", help="List the ops that patterns are written with instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """List the patterns of the library: kinds of sites for `at:`, each with its taps."""
    from peftc.patterns.listing import listed_ops, listed_patterns

    rows, problems = (listed_ops(), []) if ops else listed_patterns()
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=2, ensure_ascii=False))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            typer.echo(f"{row.name:<{width}}  {row.text}")
    end_with(problems)


def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Model types to measure anew; without one, the table as shipped."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show how far each model type of transformers gets: sites found, rules applied, a reason for each miss."""
    from peftc.survey import table

    shown = table.measured_anew(names) if names else table.table()
    if as_json:
        typer.echo(json.dumps(shown.shown(), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        table.render(Console(), shown)


def schema(
    kind: Annotated[
        FileKind, typer.Argument(metavar="[rule|form|pattern]", help="Which kind of file.")
    ] = FileKind.rule,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the whole reference as Markdown.")] = False,
) -> None:
    """Print the JSON Schema of rule, form or pattern files, for editors; or the reference of the language."""
    from peftc.lang.json_schema import schema_text

    if markdown:
        from peftc.reference.pages import reference

        typer.echo(reference(), nl=False)
        return

    typer.echo(schema_text(kind.value), nl=False)


def end_with(problems: list[Diagnostic]) -> None:
    """End a listing with what is wrong with installed packages: told on stderr, and exit code 2."""
    from peftc.cli import USER_ERROR

    if problems:
        print_diagnostics(tuple(problems))
        raise typer.Exit(USER_ERROR)


def print_diagnostics(diagnostics: tuple[Diagnostic, ...], *, stderr: bool = True, apart: bool = False) -> None:
    """Print diagnostics in colour where there is a terminal, the first 50 of them; `apart` starts with a blank line."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    for position, diagnostic in enumerate(diagnostics[:MOST_SHOWN]):
        headline, *rest = diagnostic.render().split("\n")
        text = Text.assemble(*([("\n", "")] if position or apart else []), (headline, STYLES[diagnostic.severity]))
        for line in rest:
            text.append(f"\n{line}", "cyan" if line.startswith("   = help") else "")
        console.print(text)
    if len(diagnostics) > MOST_SHOWN:
        console.print(f"\n{and_more(len(diagnostics) - MOST_SHOWN)}")
