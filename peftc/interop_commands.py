"""Commands that read and write the formats of other libraries: import.

$ peftc import my-lora --model bert -o peftc-out && peftc merge peftc-out
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftc.shared_options import JsonOption, QuietOption, show


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
