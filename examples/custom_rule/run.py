"""A method that nobody has written yet, in ten steps: from an empty file to a trained and exported model.

    python examples/custom_rule/run.py

Checks each step as `peftc check` does, runs the tests that the last one holds, plans it on all-MiniLM-L6-v2, trains it
for a few steps, compares it with the same layer written by hand in torch, and exports it to ONNX.
rules/LANGUAGE.md goes through the steps one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from word_order import Example, examples, minilm_dir

import peftc
from peftc import driver
from peftc.checking.check import check

HERE = Path(__file__).parent
STEPS = [f"step_{number:02}.yaml" for number in range(1, 11)]
RULE = HERE / STEPS[-1]
HEAD: dict[str, Any] = {"head": "sequence-classification", "num_labels": 2}
BATCH, LEARNING_RATE = 16, 5e-3
OUT = Path("custom-out")


class GatedHeads(nn.Module):
    """The last step by hand: BERT's attention, to each head of which s g(x) W_up gelu(W_down x) is added."""

    def __init__(self, attention: nn.Module, delta: dict[str, Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.delta = nn.ParameterDict({name: nn.Parameter(value.detach().clone()) for name, value in delta.items()})

    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Any, ...]:
        merged, *rest = self.attention(x, *args, **options)
        return (merged + torch.cat([*self._heads(x)], dim=-1), *rest)

    def _heads(self, x: Tensor) -> Iterator[Tensor]:
        delta = self.delta
        for head in range(delta["s"].shape[0]):
            gate = torch.sigmoid(x @ delta["W_g"][head])[..., None]
            middle = nn.functional.gelu(x @ delta["W_down"][head].T)
            yield delta["s"][head] * gate * (middle @ delta["W_up"][head].T)


def by_hand(base: Any, adapted: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """A plain BERT with the adapted model's deltas put in by hand; and those by the adapted model's names."""
    own: dict[str, nn.Parameter] = {}
    base.load_state_dict({name: tensor for name, tensor in adapted.state_dict().items() if ".peftc." not in name})
    for index, layer in enumerate(base.base_model.encoder.layer):
        names = [name for name in adapted.surgery.plan.parameters if f".layer.{index}." in f".{name}"]
        delta = {name.rpartition(".")[2]: adapted.get_parameter(name) for name in names}
        layer.attention.self = GatedHeads(layer.attention.self, delta)
        own.update({name: layer.attention.self.delta[name.rpartition(".")[2]] for name in names})
    return base.eval(), own


def differences(adapted: Any, base: Any, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """The largest difference of outputs, and of the deltas' gradients relative to the largest gradient."""
    reference, own = by_hand(base, adapted)
    ours, theirs = adapted.eval()(**inputs)[0], reference(**inputs)[0]
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    found = torch.autograd.grad((ours * weight).sum(), [adapted.get_parameter(name) for name in own])
    wanted = torch.autograd.grad((theirs * weight).sum(), [*own.values()])
    largest = max(float(g.abs().max()) for g in wanted)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return float((ours - theirs).detach().abs().max()), worst / largest


def train(model: Any, tokenizer: Any, rows: list[Example], steps: int) -> tuple[float, float]:
    """Over and over the same few rows, which shows learning in few steps; the mean loss of the first and last pass."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    model.train()
    for step in range(steps):
        start = step * BATCH % len(rows)
        chosen = rows[start : start + BATCH]
        encoded = tokenizer([row.text for row in chosen], padding=True, return_tensors="pt")
        loss = model(**encoded, labels=torch.tensor([row.label for row in chosen])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    batches = len(rows) // BATCH
    return sum(losses[:batches]) / batches, sum(losses[-batches:]) / batches


def check_steps() -> None:
    for step in STEPS:
        (file,) = check([str(HERE / step)]).files
        first = file.diagnostics[0].message if file.diagnostics else "no mistake"
        print(f"{step}: {first}")


def main(steps: int = 24) -> None:
    from rich.console import Console
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    from peftc.checking.rule_tests import run_tests
    from peftc.lang.loader import load_rule

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    check_steps()
    for result in run_tests(load_rule(RULE), str(RULE)):
        print(f"test of the rule: {result.outcome}")

    base = minilm_dir()
    driver.plan(RULE, base, **HEAD).render(console)
    torch.manual_seed(0)
    model = peftc.apply(RULE, base, **HEAD)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, _ = examples(train=4 * BATCH, test=100)
    first, last = train(model, tokenizer, rows, steps)
    print(f"loss {first:.3f} -> {last:.3f}")

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    inputs = dict(tokenizer([row.text for row in rows[:8]], padding=True, return_tensors="pt"))
    outputs, gradients = differences(model, plain, inputs)
    print(f"against the layer by hand: outputs differ by {outputs:.1e}, gradients by {gradients:.1e} of the largest")

    model.save_pretrained(OUT / "delta")
    driver.merge(OUT / "delta", OUT / "merged", export={"onnx"}).render(console)


if __name__ == "__main__":
    main()
