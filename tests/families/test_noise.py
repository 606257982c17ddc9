"""Noise of training is no part of evaluation, and masks made by mapped functions are plain ops of the graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import peftc
from families.family import randomised
from peftc.frontend.masks import masks_by_broadcasting
from peftc.frontend.noise import evaluated, strict_in_training, without_noise
from peftc.ir.program import Program
from peftc.passes.set_mode import SetMode, draws


def test_jittered_coordinates_are_off_in_evaluation(tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1
    )
    plain = randomised(transformers.DINOv3ViTModel(config))
    plain.save_pretrained(tmp_path)
    adapted = peftc.apply("lora", tmp_path, set={"r": 4})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(images).last_hidden_state
        assert torch.equal(adapted.eval()(images).last_hidden_state, expected)


class _Draws(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x + torch.empty_like(x).uniform_(0, 1), 0.5, training=True)


def test_a_dropout_is_no_draw_of_an_evaluation_graph_and_other_noise_is() -> None:
    graph = torch.export.export(_Draws(), (torch.ones(3),)).graph
    SetMode(training=False).apply_to(graph)
    assert [node.target for node in draws(graph)] == [torch.ops.aten.uniform_.default]


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # that an LSTM keeps of its weights
def test_recurrent_layers_drop_nothing_in_evaluation() -> None:
    graph = torch.export.export(torch.nn.LSTM(4, 4, num_layers=2, dropout=0.5), (torch.randn(2, 5, 4),)).graph
    layers = next(node for node in graph.nodes if node.target is torch.ops.aten.lstm.input)
    assert layers.args[5:7] == (0.5, True)
    SetMode(training=False).apply_to(graph)
    assert layers.args[6] is False and draws(graph) == []


class _Strict(torch.nn.Module):
    def forward(self) -> None:
        if self.training:
            raise ValueError("labels are needed")


def test_the_module_that_raises_in_training_only_is_told_from_those_around_it() -> None:
    model = torch.nn.ModuleDict({"outer": torch.nn.Sequential(torch.nn.Identity()), "head": _Strict()})
    with pytest.raises(ValueError, match="labels") as caught:
        model["head"]()
    found = strict_in_training(model, caught.value.__traceback__)
    assert found == {"head"}
    with evaluated(model, found):
        model["head"]()
        assert model.training
    assert model["head"].training


class _Always(torch.nn.Module):
    def forward(self) -> None:
        raise ValueError(f"no such size, {'training' if self.training else 'in evaluation'}")


def test_what_raises_in_either_mode_is_tried_once_a_module_and_raises_its_first_error() -> None:
    model, calls = torch.nn.Sequential(torch.nn.Sequential(_Always())), []

    def make() -> Program:
        calls.append(model[0][0].training)
        model[0][0]()
        raise AssertionError

    with pytest.raises(ValueError, match="no such size, training"):
        without_noise(model, make)
    assert calls == [True, False] and model[0][0].training


def test_a_mask_by_broadcasting_is_the_one_of_the_mapped_function() -> None:
    from transformers.masking_utils import sdpa_mask

    def within(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key < 3) & (key <= query) & (row >= 0) & (head >= 0)

    arguments = {"batch_size": 2, "q_length": 5, "kv_length": 7, "mask_function": within, "use_vmap": True}
    arguments["allow_is_causal_skip"] = False
    mapped = sdpa_mask(**arguments)
    with masks_by_broadcasting():
        broadcast = sdpa_mask(**arguments)
    assert mapped is not None and torch.equal(broadcast, mapped)
