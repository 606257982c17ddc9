"""The main job of peftc on a real pretrained model, step by step: what `make demo` runs.

    python examples/demo.py

Looks at MiniLM's sites, plans the MAM rule, grafts it, trains it for a few steps, folds what folds, exports to ONNX,
and prints what came of it. The result stays in demo-out/.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from word_order import Example, examples, minilm_dir

import peftc
from peftc import driver
from peftc.progress import terminal_progress

OUT = Path("demo-out")
RULE = Path(__file__).with_name("mam_classifier.yaml")
HEAD: dict[str, Any] = {"head": "sequence-classification", "num_labels": 2}
STEPS, BATCHES = 60, 6


def train(model: Any, tokenizer: Any, rows: list[Example], batch: int = 16) -> tuple[float, float]:
    """A plain torch loop over the same few batches; returns the mean loss of its first and of its last five steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    model.train()
    for step in range(STEPS):
        start = step % BATCHES * batch
        chosen = rows[start : start + batch]
        encoded = tokenizer([row.text for row in chosen], padding=True, return_tensors="pt")
        loss = model(**encoded, labels=torch.tensor([row.label for row in chosen])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    start = time.perf_counter()
    base = minilm_dir()

    console.rule("[bold]peftc sites[/bold]: what a rule can reach in all-MiniLM-L6-v2")
    driver.sites(base, **HEAD).render(console)

    console.rule("[bold]peftc plan[/bold]: what the rule would do, nothing written yet")
    plan = driver.plan(RULE, base, **HEAD)
    plan.render(console)

    console.rule(f"[bold]peftc.apply[/bold] and {STEPS} training steps")
    torch.manual_seed(0)
    model = peftc.apply(RULE, base, **HEAD)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, _ = examples(train=BATCHES * 16, test=100)
    first, last = train(model, tokenizer, rows)
    console.print(f"loss {first:.3f} -> {last:.3f} on {len(rows)} sentences")
    model.save_pretrained(OUT / "delta")

    console.rule("[bold]peftc merge --export onnx[/bold]")
    with terminal_progress(quiet=False) as progress:
        merged = driver.merge(OUT / "delta", OUT / "merged", export={"onnx"}, progress=progress)
    merged.render(console)

    console.rule("in short")
    console.print(summary(plan.to_json(), merged.to_json()))
    console.print(f"{time.perf_counter() - start:.0f} s; the ONNX model is in {OUT / 'merged'}")


def summary(plan: dict[str, Any], merged: dict[str, Any]) -> Table:
    """Sites, parameters, folds and parity, a line each."""
    worst = max(merged["comparisons"], key=lambda comparison: comparison["absolute"])
    sites = ", ".join(f"{delta} at {count}" for delta, count in plan["sites"].items())
    folds = ", ".join(f"{fold['delta']} at {fold['sites']} sites {fold['result']}" for fold in merged["folds"])
    table = Table(show_header=False, box=None)
    table.add_row("[bold]sites[/bold]", sites)
    table.add_row("[bold]trained[/bold]", f"{plan['trained']:,} parameters, {plan['percent']:.2f} % of the model")
    table.add_row("[bold]folds[/bold]", folds)
    table.add_row("[bold]ONNX parity[/bold]", f"{worst['absolute']:.1e} at most, on {worst['inputs']}")
    return table


if __name__ == "__main__":
    main()
