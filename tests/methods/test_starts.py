"""Methods whose start is made of the weight: the same start as HF `peft` or their paper, and the identity at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from torch import Tensor

from methods.harness import (
    Folded,
    apply_rule,
    difference,
    gradients,
    inputs,
    layers,
    output,
    peft_model,
    scramble,
    set_deltas,
    tiny,
)
from peftc.ir.zero import starts_as_identity

peft: Any = pytest.importorskip("peft")

WORST = 1e-5
ALL = {"bert": r".*encoder.*\.(query|key|value|dense)", "llama": r".*_proj"}
RANK, ALPHA = 4, 6.0
RULES = ["pissa", "olora"]
OTHERS = ["loftq"]
"""Rules that peft cannot start here without a GPU, held to formulas below."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(made[family])
        return made[family]

    return base


def _theirs(family: str, start: str) -> Any:
    config = peft.LoraConfig(target_modules=ALL[family], r=RANK, lora_alpha=ALPHA, init_lora_weights=start)
    return peft_model(family, config)


def _lora(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("rule", RULES)
def test_start_is_that_of_peft_and_the_base_keeps_its_weights(
    rule: str, family: str, bases: Callable[[str], Path]
) -> None:
    from peft.tuners.lora import LoraLayer

    ours = apply_rule(rule, bases(family), {"r": RANK, "alpha": ALPHA})
    program = ours.program_for(inputs())
    assert all(starts_as_identity(program, entry) for entry in program.ledger)
    assert torch.equal(output(ours), output(tiny(family))), "the start is the identity, bit for bit"
    theirs = _theirs(family, rule)
    found = layers(theirs, (LoraLayer,))
    assert {path + ".weight" for path in found} == {f"{name.partition('.peftc.')[0]}.weight" for name in _deltas(ours)}
    for path, layer in found.items():
        A, B = _lora(layer)
        A_0, B_0 = (ours.get_parameter(f"{path}.peftc.{rule}.{name}").detach() for name in ("A_0", "B_0"))
        assert difference(B_0 @ A_0, B @ A) <= WORST, "the same product, whatever the signs"
        residual = tiny(family).get_parameter(path + ".weight") - ALPHA / RANK * (B_0 @ A_0)
        assert difference(residual, layer.base_layer.weight) <= WORST


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("rule", RULES)
def test_trained_rule_computes_and_merges_what_peft_does(rule: str, family: str, bases: Callable[[str], Path]) -> None:
    from peft.tuners.lora import LoraLayer

    theirs = _theirs(family, rule)
    scramble(((n, p) for n, p in theirs.named_parameters() if p.requires_grad), 0.1)
    ours = apply_rule(rule, bases(family), {"r": RANK, "alpha": ALPHA})
    found = layers(theirs, (LoraLayer,))
    pairs = [(f"{path}.peftc.{rule}.{n}", p) for path, m in found.items() for n, p in zip("AB", _lora(m), strict=True)]
    set_deltas(ours, {n: ours.get_parameter(n).detach() for n in _deltas(ours)} | {n: p.detach() for n, p in pairs})
    expected = output(theirs)
    assert difference(expected, output(tiny(family))) > 1e-2
    apart = difference(output(ours), expected)
    own = gradients(ours, [ours.get_parameter(name) for name, _ in pairs])
    slope = max(map(difference, own, gradients(theirs, [p for _, p in pairs])))
    folded = Folded.of(ours)
    assert folded.results == {"merged"}
    merged = theirs.merge_and_unload().state_dict()
    weights = max(difference(folded.state(key), value) for key, value in merged.items())
    to = f"peft {peft.__version__} LoraConfig ({rule})"
    record(rule, to, WORST, outputs=apart, weights=weights, gradients=slope)
    assert max(apart, weights, slope) <= WORST


def _rounded(W: Tensor, bits: int, block: int) -> Tensor:
    """Symmetric rounding to 2 ** bits - 1 levels, each run of `block` entries by its largest."""
    levels = 2 ** (bits - 1) - 1
    flat = W.reshape(-1, block)
    scale = flat.abs().max(dim=1, keepdim=True).values / levels
    return (torch.floor(flat / scale + 0.5) * scale).reshape(W.shape)


@pytest.mark.parametrize("bits", [2, 4])
def test_loftq_rounds_every_weight_and_starts_from_the_best_correction(bits: int, bases: Callable[[str], Path]) -> None:
    """The correction is that of peft's decomposition (U sqrt(S), sqrt(S) V), as Li et al. 2023 say for one step."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    base = tiny("llama")
    ours = apply_rule("loftq", bases("llama"), {"r": RANK, "alpha": float(RANK), "bits": bits, "block": 16})
    expected = tiny("llama")
    for name in (name for name in _deltas(ours) if name.endswith(".A")):
        path = name.partition(".peftc.")[0]
        A, B = (ours.get_parameter(f"{path}.peftc.loftq.{n}").detach() for n in "AB")
        W = base.get_parameter(path + ".weight").detach()
        Q = _rounded(W, bits, 16)
        parts = _low_rank_decomposition(W - Q, RANK)
        assert difference(B @ A, parts["L"] @ parts["R"]) <= WORST
        assert torch.linalg.norm(W - Q - B @ A) < torch.linalg.norm(W - Q)
        assert len(Q[0, :16].unique()) < 2**bits
        expected.get_parameter(path + ".weight").data.copy_(Q + B @ A)
    assert difference(output(ours), output(expected)) <= WORST
    scramble(((name, ours.get_parameter(name)) for name in _deltas(ours)), 0.1)
    for name in (name for name in _deltas(ours) if name.endswith(".A")):
        path = name.partition(".peftc.")[0]
        A, B = (ours.get_parameter(f"{path}.peftc.loftq.{n}").detach() for n in "AB")
        W = _rounded(base.get_parameter(path + ".weight").detach(), bits, 16) + B @ A
        expected.get_parameter(path + ".weight").data.copy_(W)
    apart = difference(output(ours), output(expected))
    folded = Folded.of(ours)
    assert folded.results == {"merged"}
    weights = max(difference(folded.state(key), value) for key, value in expected.state_dict().items())
    record("loftq", "its formula in torch", WORST, outputs=apart, weights=weights)
    assert max(apart, weights) <= WORST


def test_adalora_prunes_what_a_callback_masks(bases: Callable[[str], Path]) -> None:
    """The budget of Zhang et al. 2023: a masked triple adds nothing and gets no gradient, and may come back."""
    ours = apply_rule("adalora", bases("bert"), {"r": 4, "alpha": 8.0})
    scramble((name, ours.get_parameter(name)) for name in _deltas(ours) if not name.endswith("mask"))
    full = output(ours)
    masks = {name: ours.get_parameter(name) for name in _deltas(ours) if name.endswith(".mask")}
    assert not any(mask.requires_grad for mask in masks.values())
    with torch.no_grad():
        for name, mask in masks.items():
            E = ours.get_parameter(name.replace(".mask", ".E"))
            mask.copy_((E.abs() >= E.abs().topk(2).values[-1]).float())
    pruned = output(ours)
    assert difference(pruned, full) > 1e-2
    E = [ours.get_parameter(name.replace(".mask", ".E")) for name in masks]
    for gradient, mask in zip(gradients(ours, E), masks.values(), strict=True):
        assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1] != 0).all()
    with torch.no_grad():
        for values, mask in zip(E, masks.values(), strict=True):
            values.mul_(mask)
            mask.fill_(1.0)
    assert difference(output(ours), pruned) <= 1e-6, "masked is as if the singular values were gone"
    assert Folded.of(ours).results == {"merged"}


def _deltas(model: Any) -> list[str]:
    return list(model.surgery.plan.parameters)
