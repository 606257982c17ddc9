"""Library rules whose method HF `peft` lacks, against their formulas in plain torch on the modules of the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from torch import Tensor

from methods.harness import Folded, Tensors, apply_rule, difference, output, scramble, tiny

F = torch.nn.functional
WORST = 1e-5


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    tiny("bert").save_pretrained(directory)
    return directory


Edit = Callable[[str, Tensor, Tensor, Tensors], Tensor]
"""The new output of a module, from its path, its input x, its output h and the delta parameters by name."""


def hooked(modules: Callable[[Any], list[str]], edit: Edit, deltas: Tensors) -> Any:
    model = tiny("bert")
    for path in modules(model):

        def hook(_: Any, given: tuple[Tensor, ...], result: Any, path: str = path) -> Any:
            h = result[0] if isinstance(result, tuple) else result
            after = edit(path, given[0], h, deltas)
            return (after, *result[1:]) if isinstance(result, tuple) else after

        model.get_submodule(path).register_forward_hook(hook)
    return model


def _named(suffixes: tuple[str, ...]) -> Callable[[Any], list[str]]:
    return lambda model: [path for path, _ in model.named_modules() if path.endswith(suffixes)]


def _blocks(model: Any) -> list[str]:
    return [f"encoder.layer.{index}" for index in range(len(model.encoder.layer))]


def moe_lora(path: str, x: Tensor, h: Tensor, deltas: Tensors) -> Tensor:
    owner, tap = path.rpartition(".")[0].removesuffix(".self"), path.rpartition(".")[2][0]
    W_g, A, B = (deltas[f"{owner}.peftc.moe.{tap}.{name}"] for name in ("W_g", "A", "B"))
    experts, rank = W_g.shape[0], A.shape[0] // W_g.shape[0]
    weight = (x @ W_g.T).softmax(-1)
    for i in range(experts):
        one = slice(i * rank, (i + 1) * rank)
        h = h + 6.0 / rank * weight[..., i : i + 1] * (x @ A[one].T @ B[:, one].T)
    return h


def loreft(path: str, x: Tensor, h: Tensor, deltas: Tensors) -> Tensor:
    R, W, b = (deltas[f"{path}.peftc.reft.{name}"] for name in ("R", "W", "b"))
    rows: list[Tensor] = []
    for row in R:
        left = row - sum((row @ q * q for q in rows), torch.zeros_like(row))
        rows.append(left / left.norm())
    Q = torch.stack(rows)
    return h + (h @ W.T + b - h @ Q.T) @ Q


def compacter(path: str, x: Tensor, h: Tensor, deltas: Tensors) -> Tensor:
    owner = path.removesuffix(".output.dense")

    def weight(side: str) -> Tensor:
        A = deltas[f"peftc.adapter.A_{side}"]
        S, T = (deltas[f"{owner}.peftc.adapter.{name}_{side}"] for name in "ST")
        return sum((torch.kron(A[i], S[i] @ T[i]) for i in range(len(A))), torch.zeros(1))

    b_down, b_up = (deltas[f"{owner}.peftc.adapter.b_{side}"] for side in ("down", "up"))
    z = F.gelu(h @ weight("down").T + b_down, approximate="tanh")
    return h + z @ weight("up").T + b_up


CASES: dict[str, tuple[dict[str, object], Callable[[Any], list[str]], Edit, str]] = {
    "moe_lora": ({"r": 3, "e": 4, "alpha": 6.0}, _named((".query", ".value")), moe_lora, "kept"),
    "loreft": ({"r": 3}, _blocks, loreft, "kept"),
    "compacter": (
        {"r": 8, "n": 4, "k": 2}, lambda m: [p for p in _named((".output.dense",))(m) if "encoder" in p],
        compacter, "kept"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule_computes_its_formula(name: str, base: Path) -> None:
    values, modules, edit, result = CASES[name]
    ours = apply_rule(name, base, values)
    plan = ours.surgery.plan.parameters
    scramble((parameter, ours.get_parameter(parameter)) for parameter in plan)
    deltas = {parameter: ours.get_parameter(parameter).detach() for parameter in plan}
    expected = output(hooked(modules, edit, deltas))
    assert difference(expected, output(tiny("bert"))) > 1e-2
    apart = difference(output(ours), expected)
    record(name, "its formula in torch", WORST, outputs=apart)
    assert apart <= WORST
    assert Folded.of(ours).results == {result}
