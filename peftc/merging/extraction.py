"""What an extraction found, as JSON and for people: each change, its rank and its error, and the error by rank.

The file `extraction.json` in the delta directory holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peftc.merging.lowrank import missed

if TYPE_CHECKING:
    from rich.console import Console

FILE: Final = "extraction.json"
_WIDTH, _MOST = 40, 30


@dataclass(frozen=True, slots=True)
class Extracted:
    """One weight: `change` is ‖W' - W‖ (Frobenius), `error` the share of it that what was written misses, measured.

    `exact` says that all singular values are known; of a sketched matrix `values` are the first.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    change: float
    error: float
    exact: bool
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "name": self.name, "shape": list(self.shape), "rank": self.rank, "change": self.change,
            "error": self.error, "exact": self.exact,
        }  # fmt: skip
        return document | {"singular_values": list(self.values[: 2 * self.rank])}


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was written: changes of low rank, tensors kept whole, and those that were left out."""

    out: Path
    tensors: list[Extracted]
    whole: list[str]
    dropped: list[str]
    stored: int
    """Elements of the delta directory."""

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """For powers of two up to the largest rank, and that rank: the share of all changes together that is missed,
        and the largest share of one."""
        most = max((entry.rank for entry in self.tensors), default=0)
        ranks = [*(1 << k for k in range(most.bit_length()) if 1 << k < most), most] if most else []
        return [(rank, *self._missed(rank)) for rank in ranks]

    def _missed(self, rank: int) -> tuple[float, float]:
        shares = [missed(e.values, e.change, rank) for e in self.tensors]
        total = math.fsum(e.change**2 for e in self.tensors)
        lost = math.fsum((s * e.change) ** 2 for s, e in zip(shares, self.tensors, strict=True))
        return math.sqrt(lost / total) if total else 0.0, max(shares)

    @property
    def error(self) -> float:
        """The share of all low-rank changes together that what was written misses."""
        total = math.fsum(e.change**2 for e in self.tensors)
        return math.sqrt(math.fsum((e.error * e.change) ** 2 for e in self.tensors) / total) if total else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "error": self.error,
            "curve": [{"rank": rank, "error": all_, "worst": worst} for rank, all_, worst in self.curve],
            "tensors": [entry.to_json() for entry in self.tensors],
            "whole": self.whole,
            "dropped": self.dropped,
            "stored": self.stored,
        }

    def render(self, console: Console) -> None:
        from rich.table import Table

        table = Table("weight", "shape", "rank", "change", "error", box=None, pad_edge=False)
        for entry in sorted(self.tensors, key=lambda e: -e.error)[:_MOST]:
            shape = "x".join(map(str, entry.shape))
            table.add_row(entry.name, shape, str(entry.rank), f"{entry.change:.3g}", f"{entry.error:.2e}")
        console.print(table)
        if len(self.tensors) > _MOST:
            console.print(f"and {len(self.tensors) - _MOST} more, with smaller errors; all are in {FILE}")
        self._draw(console)
        for what, names in (("kept whole", self.whole), ("left out", self.dropped)):
            if names:
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                console.print(f"{what}: {shown}")
        console.print(f"wrote [bold]{self.out}[/bold], {self.stored:,} numbers; then: peftc merge {self.out}")

    def _draw(self, console: Console) -> None:
        """The share that is missed, by rank, as bars."""
        from rich.table import Table

        if not self.tensors:
            return
        table = Table("rank", "missed", "of all changes", "of the worst", box=None, pad_edge=False)
        for rank, share, worst in self.curve:
            table.add_row(str(rank), f"{share:.2e}", _bar(share), f"{worst:.2e}")
        console.print(table)


def _bar(share: float) -> str:
    eighths = round(8 * _WIDTH * min(1.0, share))
    full, part = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
