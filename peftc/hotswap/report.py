"""What an export with adapters wrote, as JSON for programs and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from peftc.backends.onnx import OnnxFiles
    from peftc.merging.certify import Comparison


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """One adapter: the structure whose inputs it fills, how many, its file, and how far it is from torch."""

    name: str
    rule: str
    structure: str
    inputs: int
    nbytes: int
    comparisons: Sequence[Comparison]

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "structure": self.structure,
            "inputs": self.inputs,
            "bytes": self.nbytes,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


@dataclass(frozen=True, slots=True)
class AdaptersReport:
    """What was written: the model with its optional inputs, and the adapters; `files` are their sha256 by name."""

    out: Path
    onnx: OnnxFiles
    optional: int
    adapters: tuple[AdapterReport, ...]
    base: Sequence[Comparison]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": list(self.onnx.inputs),
            "outputs": list(self.onnx.outputs),
            "opset": self.onnx.opset,
            "optional_inputs": self.optional,
            "comparisons": [comparison.to_json() for comparison in self.base],
            "files": dict(self.files),
            "adapters": {adapter.name: adapter.to_json() for adapter in self.adapters},
        }

    def render(self, console: Console) -> None:
        from rich.table import Table

        table = Table(title=f"{self.out}: model.onnx, {self.onnx.nodes} nodes, {self.optional} optional inputs")
        for column in ("adapter", "rule", "structure", "inputs", "size", "largest difference from torch"):
            table.add_column(column)
        table.add_row("(none)", "", "", "", "", _largest(self.base))
        for a in self.adapters:
            size = f"{a.nbytes / 1e6:.2f} MB"
            table.add_row(a.name, a.rule, a.structure, str(a.inputs), size, _largest(a.comparisons))
        console.print(table)


def _largest(comparisons: Sequence[Comparison]) -> str:
    return f"{max(comparison.absolute for comparison in comparisons):.1e}"
