"""Certificates hold for no NaN, and infinities that agree are no difference."""

from __future__ import annotations

import math

import pytest
import torch

from peftc.diagnostics import PeftcError
from peftc.merging import certify
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


@pytest.mark.parametrize("piece", [1, 20, 1 << 20])
def test_a_comparison_in_pieces_is_that_of_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "_PIECE", piece)
    one = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[1, 2, 3] += 5  # a token of its own there
    other[0, 5, 1] += 900  # padding
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    found = certify.compared("it", "made up", {"attention_mask": mask}, [one], [other], 1e-4, "float32", 9)
    assert found.absolute == pytest.approx(5) and found.top1 == 9 / 10
    assert found.scale == one[mask.bool()].abs().max()
