"""Deltas that are affine through a linear layer become a change of its weight, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fold.conftest import Checkpoints
from fold.support import fold, merge

AFFINE = {
    "lora": {"r": 3, "alpha": 6.0},
    "lora_ffn": {"r": 3},
    "bitfit": {},
    "houlsby": {"r": 3, "f": "identity"},
    "seq_ffn": {"r": 3, "f": "identity"},
}


ON_BART = ("lora", "lora_ffn", "bitfit")


@pytest.mark.parametrize(("family", "name"), [*(("bert", n) for n in AFFINE), *(("bart", n) for n in ON_BART)])
def test_an_affine_method_merges_into_a_plain_checkpoint(
    family: str, name: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = fold(name, checkpoint(family), tmp_path, set=AFFINE[name])
    assert set.union(*found.results.values()) == {"merged"}
    assert found.difference <= 1e-10
    assert found.changed()


@pytest.mark.parametrize(("family", "name"), [("bert", "lora"), ("bart", "houlsby")])
def test_a_merge_certifies_that_the_checkpoint_computes_the_same(
    family: str, name: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = merge(name, checkpoint(family), tmp_path, set=AFFINE[name])
    assert set.union(*found.results.values()) == {"merged"}
    assert found.difference <= 1e-10
    certificate = found.certificate
    assert certificate["comparisons"]
    assert all(c["holds"] and c["absolute"] <= 1e-10 for c in certificate["comparisons"])
    assert set(certificate["delta_sha256"]) == set(found.adapted.surgery.plan.parameters)


def test_float32_merges_are_exact_to_rounding(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = merge("houlsby", checkpoint("bert", torch.float32), tmp_path, set=AFFINE["houlsby"])
    assert found.difference <= 1e-5
    assert {c["dtype"] for c in found.certificate["comparisons"]} == {"float32", "float64"}
