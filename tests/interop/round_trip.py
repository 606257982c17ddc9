"""One adapter of PEFT's, there and back: what is measured of it, for the tests and for the table of the README.

$ python tests/interop/round_trip.py            # prints the table
$ python tests/interop/round_trip.py DoRA OFT   # the rows whose names hold one of these words
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import peftc
from interop.cases import CASES
from interop.subjects import Made, loaded, made, model, says, slope
from peftc import driver
from peftc.interop.export import export_adapter
from peftc.interop.importing import import_adapter
from peftc.interop.reading import viewed
from peftc.interop.report import ImportReport
from peftc.store.model_dir import ModelDir

FILES = ("rule.yaml", "delta.safetensors")


@dataclass(frozen=True, slots=True)
class Measured:
    """The largest differences between PEFT and peftc, in float64; None where there is nothing to compare."""

    effect: float
    """What the adapter changes: equality would prove nothing without."""
    imported: float
    gradients: float | None
    merged: float | None
    exported: float
    """PEFT's own outputs, of the adapter that was saved and of the one that came back."""
    stored: bool
    """Whether the adapter that came back holds the same tensors, and imports to the same bytes."""


def measure(case: str, family: str, place: Path) -> Measured:
    """Make the adapter of a case, import it, and compare."""
    theirs = made(family, CASES[case].configure(family), place)
    report = import_adapter(theirs.adapter, place / "delta", model_dir=theirs.base)
    ours = peftc.load(place / "delta")
    expected = says(theirs.model).detach()
    export_adapter(place / "delta", place / "back")
    back = says(loaded(family, place / "back")).detach()
    return Measured(
        apart(expected, says(model(family))),
        apart(expected, says(ours)),
        _slopes(ours, theirs, report),
        None if family in CASES[case].unmerged else _merged(theirs, place),
        apart(expected, back),
        _came_back(theirs, place),
    )


def _came_back(theirs: Made, place: Path) -> bool:
    saved, back = (load_file(folder / "adapter_model.safetensors") for folder in (theirs.adapter, place / "back"))
    import_adapter(place / "back", place / "again", model_dir=theirs.base)
    same = all((place / "delta" / n).read_bytes() == (place / "again" / n).read_bytes() for n in FILES)
    return same and all(name in saved and torch.equal(value, saved[name]) for name, value in back.items())


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.isfinite().all()
    return float((one - other).detach().abs().max())


def _slopes(ours: Any, theirs: Made, report: ImportReport) -> float | None:
    """Of the gradients: PEFT's, seen through the views of the table, are peftc's."""
    if not theirs.trained:
        return None
    wanted = dict(zip(theirs.trained, slope(theirs.model, list(theirs.trained.values())), strict=True))
    names = [name for name in report.sources if ours.get_parameter(name).requires_grad]
    found = dict(zip(names, slope(ours, [ours.get_parameter(name) for name in names]), strict=True))
    seen = 0.0
    for name, gradient in found.items():
        source = report.sources[name]
        theirs_too = wanted[source.key]
        if source.view is not None and source.sizes is not None:
            theirs_too = viewed(source.view, theirs_too, source.sizes)
        seen = max(seen, apart(theirs_too.reshape(gradient.shape), gradient))
    return seen


def _merged(theirs: Made, place: Path) -> float:
    """Of the weights, merged by either."""
    driver.merge(place / "delta", place / "merged", precision="float64", outputs=False)
    merged = theirs.model.merge_and_unload()
    stored = ModelDir.open(place / "merged")
    wanted: Mapping[str, Tensor] = merged.state_dict()
    left = {name.replace(".modules_to_save.default.", "."): name for name in wanted}  # PEFT may leave a wrapper
    return max(apart(wanted[left[name]], stored.read(name)) for name in stored.tensors)


def main() -> None:
    """Print the table."""
    print("| adapter | model | outputs | gradients | merged weights | back in PEFT | same bytes |\n" + 7 * "|---" + "|")
    words = sys.argv[1:] or [""]
    for name, case in CASES.items():
        for family in case.families if any(word in name for word in words) else ():
            with tempfile.TemporaryDirectory() as place:
                found = measure(name, family, Path(place))
            figures = (found.imported, found.gradients, found.merged, found.exported)
            shown = ["" if figure is None else f"{figure:.0e}" if figure else "0" for figure in figures]
            print("| " + " | ".join([name, family, *shown, "yes" if found.stored else "no"]) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
