"""Certificates hold for no NaN, and infinities that agree are no difference."""

from __future__ import annotations

import math

import pytest
import torch

from peftc.diagnostics import PeftcError
from peftc.merging.certify import compare, refuse_failed


def compared(unfolded: list[float], folded: list[float]) -> float:
    def run(values: list[float]) -> list[torch.Tensor]:
        return [torch.ones(2), torch.tensor(values)]

    results = compare(
        "it", lambda _: run(unfolded), lambda _: run(folded), [("made up", {})], tolerance=1e-4, dtype="float32"
    )
    refuse_failed(results)
    return results[0].absolute


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("sides", [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (math.inf, 1.0)])
def test_certificate_refuses_what_is_no_number(sides: tuple[float, float], where: int) -> None:
    unfolded, folded = ([1.0, 1.0] for _ in range(2))
    unfolded[where], folded[where] = sides
    with pytest.raises(PeftcError) as raised:
        compared(unfolded, folded)
    assert raised.value.diagnostics[0].code == "E039"


def test_infinities_that_agree_are_no_difference_and_admit_none_beside_them() -> None:
    assert compared([-math.inf, 1.0], [-math.inf, 1.0]) == 0
    with pytest.raises(PeftcError):
        compared([-math.inf, 1.0], [-math.inf, 1.1])
