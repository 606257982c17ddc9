"""Every rule of the library computes its method: outputs and delta gradients equal those of the references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recording import record

import peftc
from reference.case import Case
from reference.compare import TOLERANCE, Hyper, assert_equal
from reference.methods import METHODS

ADAPTER: Hyper = {"r": 5, "f": "relu", "bias": True}
SIZES: dict[str, Hyper] = {
    "full": {},
    "bitfit": {},
    "prompt": {"l": 3},
    "prefix": {"l": 3},
    "prefix_gated": {"l": 3},
    "prefix_mlp": {"l": 3, "m": 6},
    "prefix_ungated": {"l": 3},
    "houlsby": ADAPTER,
    "pfeiffer": ADAPTER,
    "seq_attn": ADAPTER,
    "seq_ffn": ADAPTER,
    "lora": {"r": 5, "alpha": 8.0},
    "lora_ffn": {"r": 5, "s": 2.0},
    "pa_attn": ADAPTER,
    "pa_ffn": ADAPTER,
    "pa_pa": {"r_attn": 3, "r_ffn": 5, "f": "relu", "bias": True},
    "mh_pa": ADAPTER,
    "scaled_pa": {**ADAPTER, "s": 2.0},
    "scaled_pa_learned": ADAPTER,
    "prefix_lora": {"l": 3, "r": 5, "s": 2.0},
    "mam": {**ADAPTER, "l": 3, "s": 2.0},
    "unipelt": {**ADAPTER, "l": 3, "r_lora": 4, "alpha": 8.0},
}
VARIANTS: list[tuple[str, Hyper]] = [
    *SIZES.items(),
    ("houlsby", {"r": 5, "f": "gelu", "bias": False}),
    ("mam", {"l": 3, "r": 5, "s": 2.0, "f": "tanh", "bias": False}),
]
RULES = Path(__file__).parents[2] / "rules"


def test_every_reference_is_of_a_rule_of_the_library() -> None:
    assert set(METHODS) == set(SIZES) <= {file.stem for file in RULES.glob("*.yaml")}


QUICK = ("prompt", "prefix", "prefix_gated", "houlsby", "lora", "pa_ffn", "mam")
"""Rules that `make test` runs on BART too, which takes three times as long as BERT."""


def on_both() -> list[Any]:
    found: list[Any] = []
    for model in ("bert", "bart"):
        for rule, hyper in VARIANTS:
            quick = model == "bert" or (rule in QUICK and hyper == SIZES[rule])
            name = "-".join([model, rule, *(str(value) for value in hyper.values())])
            found.append(pytest.param(rule, hyper, model, id=name, marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("rule", "hyper", "case"), on_both(), indirect=["case"])
def test_rule_equals_its_reference(rule: str, hyper: Hyper, case: Case) -> None:
    model = peftc.apply(rule, case.directory, set=hyper, seed=0)
    found = assert_equal(model, case, METHODS[rule], hyper)
    record(rule, "modules in plain torch", TOLERANCE, **found)
    if rule == "full":
        assert all(parameter.requires_grad for parameter in model.parameters())
