"""A graph traced once runs on any device, and a model that is converted answers in its new dtype.

Fake tensors stand in for a GPU: they are of the device "cuda" without one, and an op that mixes devices is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import peftc
from peftc.runtime.executor import Executor
from peftc.runtime.generation import trace_for_generation
from runtime.tiny import batch, seq2seq_batch

Load = Callable[..., Any]
MAM: dict[str, Any] = {"l": 3, "r": 4}
CUDA = torch.device("cuda", 0)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return seq2seq_batch() if name == "bart" else batch()


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "bart"])
def test_a_graph_on_another_device_makes_every_tensor_there(adapted: Load, name: str) -> None:
    model, inputs = adapted(name, "mam", set=MAM), inputs_of(name)
    program = model.program_for(inputs)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for training in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True):
            executor = Executor(program, training=training, device=CUDA)
        with FakeTensorMode():
            executor._constants = {name: elsewhere(value) for name, value in executor._constants.items()}
            state = {name: elsewhere(tensor) for name, tensor in tensors}
            given = {name: elsewhere(tensor) for name, tensor in inputs.items()}
            found = executor(state, given, model.get_submodule)
        assert {leaf.device for leaf in pytree.tree_leaves(found)} == {CUDA}


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_no_graph_for_generation_names_the_device_it_was_traced_on(adapted: Load, name: str) -> None:
    model = adapted(name, "mam", set=MAM)
    trace_for_generation(model)
    for program in model.surgery.programs.values():
        executor = Executor(program, training=False, device=torch.device("meta"))
        named = [node for node in executor.module.graph.nodes if makes(node)]
        assert named
        for node in named:
            devices = {leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, torch.device)}
            assert devices <= {torch.device("meta")}
            assert devices or any(isinstance(operand, fx.Node) for operand in node.all_input_nodes), node.format_node()


def makes(node: fx.Node) -> bool:
    """Whether an op can be told a device."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.name == "device" for argument in schema.arguments)


def test_a_model_that_moves_is_not_traced_again(adapted: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(adapted("llama", "mam", set=MAM))
    model(**batch())

    def trace(*args: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("peftc.runtime.graph_model.analyse", trace)
    away = model.to("meta")
    result = away(**{name: tensor.to("meta") for name, tensor in batch().items()})
    assert result.logits.device.type == "meta"
    assert result.logits.shape == (3, 9, 99)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_converted_model_answers_in_its_dtype_near_what_it_was(
    adapted: Load, convert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(adapted("llama", "mam", set=MAM))
    with torch.no_grad():
        expected = model(**batch()).logits
        getattr(model, convert)()
        found = model(**batch()).logits
    assert found.dtype == model.dtype != torch.float32
    near = 1e-5 if convert == "double" else 5e-2
    assert (found.float() - expected).norm() < near * expected.norm()
    if convert == "double":  # exact to undo, and the first trace serves again
        monkeypatch.setattr("peftc.runtime.graph_model.analyse", None)
        with torch.no_grad():
            assert torch.equal(model.float()(**batch()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_takes_a_dtype_and_a_device(model_dir: Load, tmp_path: Any, dtype: torch.dtype) -> None:
    peftc.apply("mam", model_dir("gpt2"), MAM).save_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = peftc.load(tmp_path / "out")(**batch()).logits
        model: Any = peftc.load(tmp_path / "out", dtype=dtype, device="cpu")
        found = model(**batch()).logits
    assert found.dtype == model.dtype == dtype
    assert (found.float() - expected).norm() < 5e-2 * expected.norm()
    away: Any = peftc.load(tmp_path / "out", dtype=dtype, device="meta")
    assert {tensor.device.type for tensor in away.state_dict().values()} == {"meta"}
