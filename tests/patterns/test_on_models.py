"""A rule with a pattern of its own on BERT, Llama and T5: found in every layer, inserted, trained, folded, exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fold.conftest import Checkpoints
from fold.support import adapt, fold, largest_difference, load_plain, merge, outputs, padded_inputs

import peftc
from peftc.lang.loader import parse_rule

BERT = """
      - up = linear(x, W_up, b_up)
      - mid = gelu(up)
      - out = linear(mid, W_down, b_down)
"""
LLAMA = """
      - gate = linear(x, W_gate)
      - up = linear(x, W_up)
      - mid = silu(gate) * up
      - out = linear(mid, W_down)
"""
T5 = """
      - up = linear(x, W_up)
      - mid = relu(up)
      - out = linear(mid, W_down)
"""


@dataclass(frozen=True)
class Case:
    """A family, its FFN as lines, and the modules that hold the first and the last linear layer of each."""

    family: str
    lines: str
    ups: tuple[str, ...]
    downs: tuple[str, ...]
    places: tuple[tuple[str, int], ...]


CASES = (
    Case(
        "bert",
        BERT,
        tuple(f"encoder.layer.{i}.intermediate.dense" for i in range(2)),
        tuple(f"encoder.layer.{i}.output.dense" for i in range(2)),
        (("encoder", 0), ("encoder", 1)),
    ),
    Case(
        "llama",
        LLAMA,
        ("model.layers.0.mlp.up_proj",),
        ("model.layers.0.mlp.down_proj",),
        (("decoder", 0),),
    ),
    Case(
        "t5",
        T5,
        tuple(f"{stack}.block.0.layer.{i}.DenseReluDense.wi" for stack, i in (("encoder", 1), ("decoder", 2))),
        tuple(f"{stack}.block.0.layer.{i}.DenseReluDense.wo" for stack, i in (("encoder", 1), ("decoder", 2))),
        (("encoder", 0), ("decoder", 0)),
    ),
)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)


def rule(case: Case, rows: str) -> str:
    shapes = "    shapes: {W_up: [hidden, width]}\n    where: hidden > width\n"
    return (
        f"peftc: 1\nname: t\nhyper: {{r: 3}}\npatterns:\n  mine:\n    match:{case.lines}{shapes}deltas:\n"
        + f"{rows.rstrip()}\n"
    )


LOW_RANK = """
  first: {at: mine, modify: up, form: low_rank, compose: h + 0.5 * dh}
  last:  {at: mine, modify: out, insert: mid, form: low_rank, compose: h + 0.5 * dh}
""".lstrip("\n")


@EACH
def test_a_pattern_is_found_in_every_layer_and_knows_where(case: Case, checkpoint: Checkpoints) -> None:
    model = peftc.apply(parse_rule(rule(case, LOW_RANK), "t.yaml"), checkpoint(case.family))
    sites = model.surgery.plan.sites_of("first")
    assert tuple((site.stack, site.layer) for site in sites) == case.places
    assert all({"x", "up", "mid", "out", "W_up", "W_down"} <= set(site.taps) for site in sites)
    assert all((site.dims["hidden"], site.dims["width"]) == (24, 16) for site in sites)
    found = [{role: linear.weight_name for role, linear in site.linears.items()} for site in sites]
    assert [(roles["up"], roles["out"]) for roles in found] == [
        (f"{up}.weight", f"{down}.weight") for up, down in zip(case.ups, case.downs, strict=True)
    ]


@EACH
def test_a_delta_at_a_pattern_starts_as_the_base_and_trains(case: Case, checkpoint: Checkpoints) -> None:
    base = checkpoint(case.family)
    model = peftc.apply(parse_rule(rule(case, LOW_RANK), "t.yaml"), base)
    assert largest_difference(model, load_plain(base)) == 0.0
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for name in model.surgery.plan.parameters:
            model.get_parameter(name).normal_(std=0.1)
    model(**padded_inputs(model))[0].square().sum().backward()
    for name in model.surgery.plan.parameters:
        gradient = model.get_parameter(name).grad
        assert gradient is not None and float(gradient.abs().max()) > 0, name


class _Adapted(torch.nn.Module):
    """A linear layer with 0.5 B A x beside it, by hand."""

    def __init__(self, linear: torch.nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.down, self.up = linear, down, up

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight  # T5 looks at the dtype of wo

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 0.5 * (x @ self.down.T) @ self.up.T


@EACH
def test_a_delta_at_a_pattern_is_the_one_written_by_hand(case: Case, checkpoint: Checkpoints) -> None:
    model = adapt(rule(case, LOW_RANK), checkpoint(case.family))
    plain: Any = load_plain(checkpoint(case.family))
    deltas = {name: model.get_parameter(name).detach() for name in model.surgery.plan.parameters}
    for row, modules in (("first", case.ups), ("last", case.downs)):
        downs = [value for name, value in deltas.items() if name.endswith(f"{row}.A")]
        ups = [value for name, value in deltas.items() if name.endswith(f"{row}.B")]
        for module, down, up in zip(modules, downs, ups, strict=True):
            owner, _, leaf = module.rpartition(".")
            linear = plain.get_submodule(module)
            setattr(plain.get_submodule(owner), leaf, _Adapted(linear, down, up))
    assert largest_difference(model, plain) <= 1e-12


@EACH
def test_a_low_rank_delta_at_a_pattern_merges(case: Case, checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = fold(rule(case, LOW_RANK), checkpoint(case.family), tmp_path)
    assert found.results == {"first": {"merged"}, "last": {"merged"}}
    assert found.changed() == {f"{name}.weight" for name in (*case.ups, *case.downs)}
    assert found.difference <= 1e-10


@EACH
def test_a_weight_of_a_pattern_is_changed_and_merged(case: Case, checkpoint: Checkpoints, tmp_path: Path) -> None:
    row = "  scaled: {at: mine, modify: W_down, form: 'outer(u, v)', compose: h * (1 + dh),\n"
    row += "           params: {u: {shape: [d_out], init: normal(0.1)}, v: {shape: [d_in], init: zeros}}}\n"
    found = fold(rule(case, row), checkpoint(case.family), tmp_path)
    assert found.results == {"scaled": {"merged"}}
    assert found.changed() == {f"{name}.weight" for name in case.downs}
    assert found.difference <= 1e-10
    before, after = load_plain(checkpoint(case.family)), found.plain
    parameters = {n: found.adapted.get_parameter(n).detach() for n in found.adapted.surgery.plan.parameters}
    rows = [value for name, value in parameters.items() if name.endswith(".u")]
    columns = [value for name, value in parameters.items() if name.endswith(".v")]
    for name, u, v in zip(case.downs, rows, columns, strict=True):
        expected = before.get_parameter(f"{name}.weight") * (1 + torch.outer(u, v))
        assert torch.allclose(after.get_parameter(f"{name}.weight"), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_delta_at_a_pattern_is_exported_to_onnx(checkpoint: Checkpoints, tmp_path: Path) -> None:
    rows = "  stays: {at: mine, modify: out, form: bottleneck, with: {f: relu}}\n"
    found = merge(rule(CASES[0], rows), checkpoint("bert", torch.float32), tmp_path, export=frozenset({"onnx"}))
    assert found.results == {"stays": {"kept"}}
    assert (found.out / "model.onnx").is_file()
    assert all(comparison["holds"] for comparison in found.certificate["comparisons"])


def test_a_saved_delta_directory_holds_the_pattern(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = adapt(rule(CASES[0], LOW_RANK), checkpoint("bert"))
    model.save_pretrained(tmp_path / "delta")
    again = peftc.load(tmp_path / "delta")
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(again), strict=True))


def test_a_row_reads_a_pattern_of_another_layer(checkpoint: Checkpoints) -> None:
    """`from:` names a pattern as it names a built-in site: here the FFN of the layer before, beside an attention."""
    rows = (
        "  skip: {at: attention, where: {layers: [1]}, modify: out, from: 'mine[layer - 1].mid', form: '(x @ W.T)',\n"
    )
    rows += "         params: {W: {shape: [d_out, d_in], init: zeros}}}\n"
    model = adapt(rule(CASES[0], rows), checkpoint("bert"))
    (name,) = model.surgery.plan.parameters
    weight = model.get_parameter(name).detach()
    assert weight.shape == (16, 24)
    plain: Any = load_plain(checkpoint("bert"))
    kept: list[torch.Tensor] = []
    layers = plain.encoder.layer
    layers[0].intermediate.register_forward_hook(lambda module, inputs, output: kept.append(output))
    layers[1].attention.output.dense.register_forward_hook(lambda module, inputs, output: output + kept[-1] @ weight.T)
    assert largest_difference(model, plain) <= 1e-12
