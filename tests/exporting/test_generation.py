"""A model that generates is exported with its cache: onnxruntime writes the tokens that torch writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from families.family import BY_NAME
from generation.conftest import prompts

import peftc
from exporting import greedy
from exporting.conftest import Make, Save
from peftc import driver

COUNT = 8
QUICK = {("llama", "mam"), ("t5", "houlsby")}
"""A decoder and an encoder-decoder; the others, Gemma 2 with layers that see 8 tokens, run in `make test-all`."""
CASES = [
    pytest.param(family, rule, marks=() if (family, rule) in QUICK else pytest.mark.slow)
    for family in ("llama", "gpt2", "gemma2", "opt", "t5", "bart")
    for rule in ("lora", "mam", "houlsby")
]


def from_torch(delta: Path, given: dict[str, Any]) -> np.ndarray:
    model: Any = peftc.load(delta)
    options = {"forced_eos_token_id": None} if hasattr(model.config, "forced_eos_token_id") else {}
    return model.generate(**given, max_new_tokens=COUNT, do_sample=False, eos_token_id=None, **options).numpy()


@pytest.mark.parametrize(("family", "rule"), CASES)
def test_onnxruntime_writes_the_tokens_of_torch_for_two_rows_padded_on_the_left(
    family: str, rule: str, exported: Make
) -> None:
    made, given = exported(family, rule), prompts(2)
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    if BY_NAME[family].seq2seq:
        start = BY_NAME[family].config["decoder_start_token_id"]
        found = greedy.encoder_decoder(made.out, arrays, COUNT, start)
    else:
        found = greedy.decoder(made.out, arrays, COUNT)
    expected = from_torch(made.delta, given)
    assert found.tolist() == expected.tolist()
    assert len(set(found[:, -COUNT:].ravel().tolist())) > 1  # not one token over and over
    comparisons = made.certificate["comparisons"]
    assert len(comparisons) >= 3
    for comparison in comparisons:
        assert comparison["what"] == "cached steps in onnxruntime"
        assert comparison["holds"] and comparison["absolute"] < 1e-4 * max(1.0, comparison["scale"])


def ports(path: Path) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Inputs and outputs with their axes."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return tuple(  # pyright: ignore[reportReturnType]
        {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        for values in (graph.input, graph.output)
    )


def test_a_decoder_has_the_names_and_axes_that_its_users_expect(exported: Make) -> None:
    inputs, outputs = ports(exported("llama", "mam").out / "model.onnx")
    past = ["batch_size", 2, "past_sequence_length", 8]
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{i}.{word}": past for i in range(2) for word in ("key", "value")},
    }
    assert list(outputs) == ["logits", *(f"present.{i}.{word}" for i in range(2) for word in ("key", "value"))]
    assert outputs["logits"] == ["batch_size", "sequence_length", 99]
    assert {tuple(axes) for name, axes in outputs.items() if name != "logits"} == {
        ("batch_size", 2, "total_sequence_length", 8)
    }


def test_an_encoder_decoder_has_three_graphs_and_one_file_of_weights(exported: Make) -> None:
    out = exported("t5", "houlsby").out
    names = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
    assert sorted(path.name for path in out.glob("*.onnx*")) == sorted((*names, "model.onnx.data"))
    encoder, first, later = (ports(out / name) for name in names)
    assert (list(encoder[0]), list(encoder[1])) == (["input_ids", "attention_mask"], ["last_hidden_state"])
    own = [f"{i}.decoder.{word}" for i in range(2) for word in ("key", "value")]
    cross = [f"{i}.encoder.{word}" for i in range(2) for word in ("key", "value")]
    assert set(first[0]) == {"input_ids", "encoder_attention_mask", "encoder_hidden_states"}
    assert list(first[1]) == ["logits", *(f"present.{name}" for name in (*own, *cross))]
    assert set(later[0]) == {"input_ids", "encoder_attention_mask"} | {f"past_key_values.{n}" for n in (*own, *cross)}
    assert list(later[1]) == ["logits", *(f"present.{name}" for name in own)]
    used = [{t.name for t in onnx.load(str(out / n), load_external_data=False).graph.initializer} for n in names]
    assert len(used[1] & used[2]) > 10


@pytest.mark.slow
def test_a_delta_that_looks_along_the_text_is_exported_without_a_cache_and_told(saved: Save, tmp_path: Path) -> None:
    _, delta = saved("llama", "prompt")
    report = driver.merge(delta, tmp_path / "out", export={"onnx"})
    assert report.onnx is not None and not report.onnx.cached
    assert report.onnx.cache == "delta `prompt` makes the sequence longer"
    assert list(ports(tmp_path / "out" / "model.onnx")[0]) == ["input_ids", "attention_mask", "position_ids"]
