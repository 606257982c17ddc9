"""Commands that write a model without peftc in it, check it later, take it back, or read its deltas off again.

$ peftc merge peftc-out -o merged && peftc verify merged
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peftc.commands.options import JsonOption, QuietOption, show
from peftc.diagnostics import fail

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class Export(str, Enum):
    """What `merge` can write."""

    hf = "hf"
    onnx = "onnx"
    pt2 = "pt2"
    aoti = "aoti"


class Precision(str, Enum):
    """What folds are computed in."""

    float32 = "float32"
    float64 = "float64"


class Tied(str, Enum):
    """What becomes of a tied weight that a delta changes under one of its names."""

    refuse = "refuse"
    untie = "untie"
    both = "both"


class Dtype(str, Enum):
    """What the weights of an ONNX export are stored in."""

    fp32 = "fp32"
    fp16 = "fp16"


class Optimize(str, Enum):
    """What runs an ONNX export fast: onnxruntime's own ops, or those of the standard."""

    ort = "ort"
    portable = "portable"


_DTYPES = {Dtype.fp32: "float32", Dtype.fp16: "float16"}


class Certify(str, Enum):
    """What a certificate holds beside the record of every tensor."""

    outputs = "outputs"
    tensors = "tensors"


def merge(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR...", help="A delta directory (default: peftc-out); several with --adapters."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")] = Path("merged"),
    export: Annotated[
        list[Export] | None,
        typer.Option("--export", help="What to write; may be repeated. Default: hf, a plain transformers checkpoint."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="MODEL_DIR", help="The base model, if it is no longer where `apply` found it."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard, such as 5GB. Default: as the base's."),
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", help="What folds are computed in, before one rounding.")
    ] = Precision.float32,
    certify: Annotated[
        Certify,
        typer.Option("--certify", help="Compare outputs with the unfolded model's, or record changed tensors only."),
    ] = Certify.outputs,
    verify_with: Annotated[
        Path | None,
        typer.Option("--verify-with", metavar="FILE", help="Compare outputs on the lines of this text file as well."),
    ] = None,
    allow_unchanged: Annotated[
        bool, typer.Option("--allow-unchanged", help="Merge deltas that change nothing, too.")
    ] = False,
    tied: Annotated[
        Tied,
        typer.Option("--tied", help="A tied weight that a delta changes on one side: refuse, untie, or change both."),
    ] = Tied.refuse,
    undo: Annotated[
        bool, typer.Option("--undo", help="Keep what `peftc unmerge` restores the base's exact bytes from.")
    ] = False,
    opset: Annotated[
        int | None, typer.Option("--opset", metavar="N", help="ONNX: the opset, 18 to 25. Default: 20.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="ONNX: what weights are cast to. Default: the base's dtype.")
    ] = None,
    optimize: Annotated[
        Optimize | None,
        typer.Option("--optimize", help="ONNX: fuse into onnxruntime's own ops, or use the standard's for attention."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="ONNX: one graph without keys and values of past tokens.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False,
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters", help="With --export onnx: fold nothing; one model of the base, an adapter for each DIR."
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fold a delta directory into its base model, check the result against torch, and write it."""
    directory, *more = directories or [Path("peftc-out")]
    if more and not adapters:
        fail(
            "E014", "`merge` folds one delta directory", help="`--export onnx --adapters` keeps several beside one base"
        )
    most = None if max_shard_size is None else parse_size(max_shard_size)
    texts = () if verify_with is None else read_texts(verify_with)
    formats = {choice.value for choice in export or [Export.hf]}
    given = {"--opset": opset, "--dtype": dtype, "--optimize": optimize, "--no-cache": no_cache or None}
    refuse_without_onnx(formats, given)
    from peftc import driver
    from peftc.progress import terminal_progress

    place = None if base is None else str(base)
    with terminal_progress(quiet=quiet) as progress:
        if adapters:
            unfit = {
                "--export hf": export != [Export.onnx],
                "--max-shard-size": most is not None,
                "--precision": precision is not Precision.float32,
                "--certify tensors": certify is Certify.tensors,
                "--allow-unchanged": allow_unchanged,
                "--undo": undo,
                "--tied": tied is not Tied.refuse,
                "--dry-run": dry_run,
                **{option: value is not None for option, value in given.items() if option != "--no-cache"},
            }
            refuse_with_adapters([option for option, wrong in unfit.items() if wrong])
            report = driver.export_adapters([directory, *more], out, base=place, texts=texts, progress=progress)
        elif dry_run:
            report = driver.merge_schedule(directory, base=place, max_shard=most, tied=tied.value, progress=progress)
        else:
            report = driver.merge(
                directory,
                out,
                export=formats,
                base=place,
                precision=precision.value,
                max_shard=most,
                outputs=certify is Certify.outputs,
                texts=texts,
                allow_unchanged=allow_unchanged,
                undo=undo,
                tied=tied.value,
                opset=opset,
                dtype=None if dtype is None else _DTYPES[dtype],
                optimize=None if optimize is None else optimize.value,
                cache=not no_cache,
                progress=progress,
            )
    if not quiet:
        show(report, as_json=as_json)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `merge` wrote.")] = Path("merged"),
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="MODEL_DIR", help="The base model, if it is no longer where `merge` found it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a merged directory against its certificate. Exit code 3 when a tensor or file is not what was written."""
    from peftc import driver

    show(driver.verify(directory, base=None if base is None else str(base)), as_json=as_json)


def unmerge(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `merge --undo` wrote.")] = Path(
        "merged"
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")] = Path("unmerged"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Restore the base's exact bytes from a merged directory. Exit code 3 when what comes out is not the base."""
    from peftc import driver
    from peftc.progress import terminal_progress

    with terminal_progress(quiet=quiet) as progress:
        report = driver.unmerge(directory, out, progress)
    if not quiet:
        show(report, as_json=as_json)


def extract(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model directory before tuning.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model directory after it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta directory to write.")] = Path("peftc-out"),
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The rank of every change. Default: 16.")] = None,
    error: Annotated[
        float | None,
        typer.Option("--error", metavar="SHARE", help="Instead: the share of each change that may be missed, as 0.05."),
    ] = None,
    drop_others: Annotated[
        bool, typer.Option("--drop-others", help="Leave out what is no weight of a linear layer, not keep it whole.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write what tuning changed as a delta directory of low rank, with the error by rank."""
    if error is not None and (rank is not None or not 0 < error < 1):
        fail("E014", f"--error {error:g} is no share to be missed", help="give --rank, or a share between 0 and 1")
    from peftc import driver
    from peftc.progress import terminal_progress

    chosen = 16 if rank is None and error is None else rank
    with terminal_progress(quiet=quiet) as progress:
        report = driver.extract(base, tuned, out, rank=chosen, error=error, drop_others=drop_others, progress=progress)
    if not quiet:
        show(report, as_json=as_json)


def refuse_with_adapters(options: list[str]) -> None:
    """Refuse what says how to fold where nothing is folded. Raises `PeftcError` E014."""
    if "--export hf" in options:
        fail("E014", "`--adapters` is for ONNX alone", help="add `--export onnx`, and no other")
    if options:
        message = f"`{options[0]}` says how to merge or store weights, and with `--adapters` the base stays as it is"
        fail("E014", message, help="leave it out")


def refuse_without_onnx(formats: set[str], given: Mapping[str, object]) -> None:
    """Refuse options of an ONNX export where there is none. Raises `PeftcError` E014."""
    named = [name for name, value in given.items() if value is not None]
    if named and Export.onnx.value not in formats:
        fail("E014", f"`{named[0]}` is an option of ONNX exports", help="add `--export onnx`, or leave it out")


def parse_size(text: str) -> int:
    """`"5GB"` as 5,000,000,000. Raises `PeftcError` E014."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)b?\s*", text.lower())
    if match is None or float(match[1]) == 0:
        fail("E014", f"`--max-shard-size {text}` is no size", help="write it as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def read_texts(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank. Raises `PeftcError` E014."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        fail("E014", f"--verify-with {path}: cannot be read: {cause}", help="give a text file in UTF-8, a text a line")
    lines = tuple(line for line in text.splitlines() if line.strip())
    if not lines:
        fail("E014", f"--verify-with {path}: there is no text in it", help="write a text a line")
    return lines
