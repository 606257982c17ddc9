"""Inputs that a model is traced with where ids and a mask do not do, and constants that a forward writes down."""

from __future__ import annotations

import pytest
import torch

from peftc.frontend.documented import documented
from peftc.frontend.host_constants import HostConstants
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.store.heads import resolve
from peftc.survey.measure import measure
from peftc.survey.shrink import default_config, shrink


def _sizes(family: str, head: str = "base") -> dict[str, tuple[str | int, ...]]:
    cls, config = resolve(shrink(default_config(family)), family, head)
    return {name: spec.sizes for name, spec in default_inputs(build_skeleton(cls, config).model).items()}


def test_a_forward_tells_what_it_takes() -> None:
    from transformers import BrosModel

    box = documented(BrosModel)["bbox"]
    assert (box.dims, box.optional) == (("batch_size", "num_boxes", "4"), False)
    assert documented(BrosModel)["token_type_ids"].optional


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [
        ("bros", "bbox", ("batch", "sequence", 4)),
        ("lxmert", "visual_pos", ("batch", 5, 4)),
        ("patchtst", "past_values", ("batch", 32, 1)),
        ("decision_transformer", "actions", ("batch", 5, 4)),
        ("vjepa2", "pixel_values_videos", ("batch", 4, 3, 64, 64)),
        ("vilt", "pixel_values", ("batch", 3, 64, 64)),
    ],
)
def test_what_a_model_needs_besides_is_read_from_its_documentation(
    family: str, name: str, sizes: tuple[str | int, ...]
) -> None:
    assert _sizes(family)[name] == sizes


def test_a_model_of_text_is_called_with_text() -> None:
    assert set(_sizes("bert")) == set(_sizes("layoutlm")) == {"input_ids", "attention_mask"}


class _Rows(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., [-2], :] + x[:, [0, 2]][:, :1] * torch.tensor([3.0, 5.0], device=x.device)


def test_numbers_in_a_forward_survive_a_trace_on_the_meta_device() -> None:
    with HostConstants():
        exported = torch.export.export(_Rows(), (torch.ones(4, 3, 2, device="meta"),))
    assert not any(value.is_meta for value in exported.constants.values())
    with HostConstants():
        x = torch.arange(24.0).view(4, 3, 2)
        assert torch.equal(_Rows()(x), x[:, 1:2] + x[:, :1] * torch.tensor([3.0, 5.0]))


def test_rows_picked_by_a_list_and_products_with_turned_weights_are_sites() -> None:
    """Falcon: its keys are `x[..., [-2], :]` of one projection, and its layers multiply by `weight.T`."""
    record = measure("falcon", numbers=False)
    assert record.reasons == []
    assert record.found["attention"] == record.found["ffn"] == 2
