"""Commands that read and write the formats of other libraries: import, export.

$ peftc import my-lora --model bert -o peftc-out && peftc merge peftc-out
$ peftc export peftc-out --to peft -o my-lora-again
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peftc.commands.options import JsonOption, QuietOption, show


class Format(str, Enum):
    """What `export` can write."""

    peft = "peft"
    vllm = "vllm"


def import_(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER_DIR", help="An adapter as PEFT saves it.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta directory to write.")] = Path("peftc-out"),
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL_DIR", help="The base model. Default: where the adapter says it is."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="HEAD", help="The model's class. Default: the one the adapter was made for."),
    ] = None,
    num_labels: Annotated[
        int | None, typer.Option("--num-labels", min=1, help="Number of classes of a classification head.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read an adapter of Hugging Face PEFT into a rule and a delta directory."""
    from peftc.interop.importing import import_adapter
    from peftc.progress import terminal_progress

    with terminal_progress(quiet=quiet) as progress:
        report = import_adapter(adapter, out, model_dir=model, head=head, num_labels=num_labels, progress=progress)
    if not quiet:
        show(report, as_json=as_json)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A delta directory.")] = Path("peftc-out"),
    to: Annotated[
        Format, typer.Option("--to", help="The format: peft, or vllm, which is a part of it that vLLM reads.")
    ] = Format.peft,
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")] = Path("adapter"),
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="MODEL_DIR", help="The base model, if it is no longer where it was."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a delta directory as an adapter that Hugging Face PEFT reads, without merging it."""
    from peftc.interop.export import export_adapter
    from peftc.progress import terminal_progress

    with terminal_progress(quiet=quiet) as progress:
        report = export_adapter(directory, out, base=base, vllm=to is Format.vllm, progress=progress)
    if not quiet:
        show(report, as_json=as_json)
