"""The command line: reads arguments, calls the driver, prints what it reports.

Nothing here imports torch or transformers before a command runs, so `--help` answers at once. Exit codes:

    0    done
    1    a test of a rule does not hold (`peftc test`), or a bug of peftc, with its traceback
    2    a mistake of the user (`PeftcError`, or an unknown option), told on stderr; nothing was written
    3    a merged or exported model does not compute what the adapted one does (E039; nothing was written), or is not
         what was written (E054)
    130  interrupted by Ctrl-C or SIGTERM; what was there before is still whole

    $ peftc apply mam MODEL_DIR && peftc merge --export onnx
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import peftc
from peftc.commands import interop as interop_commands
from peftc.commands import merge as merge_commands
from peftc.commands import rules as commands
from peftc.commands.options import JsonOption, QuietOption, print_json, show
from peftc.diagnostics import PeftcError, fail

USER_ERROR, PARITY_FAILED, INTERRUPTED = 2, 3, 130


class Commands(TyperGroup):
    """Turns what a command raises into an exit code, for `main` and for tests alike."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PeftcError as error:
            commands.print_diagnostics(error.diagnostics)
            failed_parity = any(d.code in ("E039", "E054") for d in error.diagnostics)
            raise typer.Exit(PARITY_FAILED if failed_parity else USER_ERROR) from error
        except KeyboardInterrupt as stop:
            typer.echo("peftc: interrupted; nothing half-written was left behind", err=True)
            raise typer.Exit(INTERRUPTED) from stop


app = typer.Typer(
    name="peftc",
    cls=Commands,
    help="Graft the deltas of a rule into a pretrained model, train them, fold them away, export to ONNX.",
    epilog="Example: [bold]peftc apply mam MODEL_DIR[/bold], then [bold]peftc merge --export onnx[/bold].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

RuleArgument = Annotated[
    str, typer.Argument(metavar="RULE", help="A rule file, or the name of a rule of the library.", show_default=False)
]
ModelArgument = Annotated[
    Path,
    typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory on this machine.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a hyperparameter of the rule; may be repeated."),
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="HEAD",
        help="The model's class: base, causal-lm, masked-lm, seq2seq-lm, sequence-classification, "
        "token-classification, ... By default the class that config.json names.",
        show_default=False,
    ),
]
LabelsOption = Annotated[
    int | None, typer.Option("--num-labels", min=1, help="Number of classes of a classification head.")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"peftc {peftc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: [bold]peftc apply rules/mam.yaml MODEL_DIR -o peftc-out --set r=64 --set l=16[/bold]")
def apply(
    rule: RuleArgument,
    model_dir: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta directory to write.")] = Path("peftc-out"),
    sets: SetOption = None,
    head: HeadOption = None,
    num_labels: LabelsOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the deltas' initial values.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Graft a rule's deltas into a model and write them as a delta directory."""
    values = parse_sets(sets)
    from peftc import driver
    from peftc.progress import terminal_progress

    with terminal_progress(quiet=quiet) as progress:
        report = driver.apply(
            rule,
            model_dir,
            out,
            sets=values,
            head=head,
            num_labels=num_labels,
            seed=seed,
            progress=progress,
        )
    if not quiet:
        show(report)


@app.command(epilog="Example: [bold]peftc sites MODEL_DIR --head sequence-classification --num-labels 3[/bold]")
def sites(
    model_dir: ModelArgument,
    head: HeadOption = None,
    num_labels: LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a rule can reach in a model: its sites, their taps and dimensions."""
    from peftc import driver

    show(driver.sites(model_dir, head=head, num_labels=num_labels), as_json=as_json)


@app.command(epilog="Example: [bold]peftc plan mam MODEL_DIR --set r=64[/bold]")
def plan(
    rule: RuleArgument,
    model_dir: ModelArgument,
    sets: SetOption = None,
    head: HeadOption = None,
    num_labels: LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what `apply` would do, and what will fold and how; nothing is written."""
    values = parse_sets(sets)
    from peftc import driver

    show(driver.plan(rule, model_dir, values, head, num_labels), as_json=as_json)


@app.command(epilog="Example: [bold]peftc rules --json[/bold]")
def rules(as_json: JsonOption = False) -> None:
    """List the rules of the library, one line each: what a rule is, and what was measured of it."""
    from peftc.lang.library import catalogue
    from peftc.lang.loader import survey
    from peftc.reference.library_table import entry, render

    found, problems = survey()
    origins = {name: catalogue("").origin(name) for name in found}
    if as_json:
        print_json([entry(name, rule, origins[name]) for name, rule in found.items()])
    else:
        from rich.console import Console

        render(Console(), found, origins)
    commands.end_with(problems)


app.command(epilog="Example: [bold]peftc merge peftc-out -o merged --export hf --export onnx[/bold]")(
    merge_commands.merge
)
app.command(epilog="Example: [bold]peftc verify merged[/bold]")(merge_commands.verify)
app.command(epilog="Example: [bold]peftc merge --undo && peftc unmerge merged -o base-again[/bold]")(
    merge_commands.unmerge
)
app.command("import", epilog="Example: [bold]peftc import my-lora --model MODEL_DIR -o peftc-out[/bold]")(
    interop_commands.import_
)
app.command(epilog="Example: [bold]peftc extract BASE TUNED --rank 16[/bold]")(merge_commands.extract)
app.command(epilog="Example: [bold]peftc export peftc-out --to peft -o my-lora[/bold]")(interop_commands.export)
app.command(epilog="Example: [bold]peftc check mine.yaml --model MODEL_DIR[/bold]")(commands.check)
app.command(epilog="Example: [bold]peftc test mine.yaml -k decoder[/bold]")(commands.test)
app.command(epilog="Example: [bold]peftc explain E012[/bold]")(commands.explain)
app.command(epilog="Example: [bold]peftc ops[/bold]")(commands.ops)
app.command(epilog="Example: [bold]peftc patterns --ops[/bold]")(commands.patterns)
app.command(epilog="Example: [bold]peftc families llama bert[/bold]")(commands.families)
app.command(epilog="Example: [bold]peftc schema rule > rule.schema.json[/bold]")(commands.schema)


def parse_sets(texts: list[str] | None) -> dict[str, str]:
    """`["r=64", "f=gelu"]` as `{"r": "64", "f": "gelu"}`; the last of equal names holds.

    Raises:
        PeftcError: E014 for a text that is not NAME=VALUE.
    """
    values = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            fail("E014", f"`--set {text}` is not NAME=VALUE", help="write it as --set r=64")
        values[name.strip()] = value.strip()
    return values


def main() -> None:
    """The entry point of the `peftc` command. SIGTERM ends it as Ctrl-C does: cleaned up, exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="peftc")
