"""What import and export report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from peftc.interop.reading import Source
    from peftc.interop.table import Method
    from peftc.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class ImportReport:
    """An adapter that became a delta directory."""

    path: Path
    adapter: Path
    method: Method
    plan: Plan
    model: str
    sources: Mapping[str, Source]
    """Where each tensor of the delta directory comes from."""

    def to_json(self) -> dict[str, Any]:
        sites = {delta.name: len(self.plan.sites_of(delta.name)) for delta in self.plan.rule.deltas}
        return {
            "out": str(self.path),
            "adapter": str(self.adapter),
            "peft_type": self.method.peft_type,
            "model": self.model,
            "sites": sites,
            "trained_base": list(self.plan.trained),
            "parameters": self.plan.stored_count,
        }

    def render(self, console: Console) -> None:
        told = self.to_json()
        console.print(f"[bold]{self.adapter}[/bold]: {self.method.doc} for {self.model}")
        for name, count in told["sites"].items():
            console.print(f"  {name}: {count} site{'s' if count != 1 else ''}")
        if self.plan.trained:
            console.print(f"  parameters of the base: {len(self.plan.trained)}")
        console.print(f"{self.plan.stored_count:,} numbers -> [bold]{self.path}[/bold]", highlight=False)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A delta directory that became an adapter."""

    path: Path
    delta: Path
    peft_type: str
    modules: int
    trained_base: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.path),
            "delta": str(self.delta),
            "peft_type": self.peft_type,
            "modules": self.modules,
            "trained_base": self.trained_base,
        }

    def render(self, console: Console) -> None:
        also = f", {len(self.trained_base)} parameters of the base" if self.trained_base else ""
        console.print(f"{self.peft_type} adapter, {self.modules} modules{also} -> [bold]{self.path}[/bold]")
