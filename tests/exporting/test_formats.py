"""Options of an ONNX export: opset, dtype, fusions, no cache; and what lies beside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from generation.conftest import prompts
from typer.testing import CliRunner

from exporting import greedy
from exporting.conftest import Make, Save
from exporting.test_generation import from_torch, ports
from peftc import driver
from peftc.cli import app
from peftc.diagnostics import PeftcError

SEVENTH = {name: tensor.numpy() for name, tensor in prompts(2).items()}


def model_of(directory: Path, file: str = "model.onnx") -> Any:
    return onnx.load(str(directory / file), load_external_data=False)


def holds(made: Any) -> list[dict[str, Any]]:
    comparisons = made.certificate["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)
    return comparisons


def test_fp16_weights_have_half_the_size_and_float32_at_the_ends(exported: Make) -> None:
    made, plain = exported("llama", "mam", dtype="float16"), exported("llama", "mam")
    sizes = [(one.out / "model.onnx.data").stat().st_size for one in (made, plain)]
    assert 0.45 < sizes[0] / sizes[1] < 0.6
    graph = model_of(made.out).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    assert {kinds[name] for name in kinds if "key" in name or "value" in name} == {onnx.TensorProto.FLOAT16}
    for comparison in holds(made):
        assert comparison["dtype"] == "float16" and 1e-7 < comparison["absolute"] < 5e-3 * max(1, comparison["scale"])
        assert comparison["top1"] > 0.9
    assert greedy.decoder(made.out, SEVENTH, 3).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23, 25])
def test_every_opset_holds_for_batches_and_steps(opset: int, exported: Make) -> None:
    made = exported("llama", "mam", opset=opset)
    assert [entry.version for entry in model_of(made.out).opset_import if not entry.domain] == [opset]
    assert all(comparison["absolute"] < 1e-4 * max(1.0, comparison["scale"]) for comparison in holds(made))
    assert greedy.decoder(made.out, SEVENTH, 8).tolist() == from_torch(made.delta, prompts(2)).tolist()
    assert any(node.op_type == "Attention" for node in model_of(made.out).graph.node) == (opset >= 23)


@pytest.mark.slow
def test_portable_is_opset_23_in_ops_of_the_standard(exported: Make) -> None:
    made = exported("gpt2", "lora", optimize="portable")
    assert {(entry.domain, entry.version) for entry in model_of(made.out).opset_import} == {("", 23)}
    holds(made)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rule"), [("llama", "mam"), ("bart", "lora"), ("bert", "houlsby")])
def test_ort_fuses_and_keeps_parity(family: str, rule: str, exported: Make) -> None:
    made = exported(family, rule, optimize="ort")
    files = sorted(path.name for path in made.out.glob("*.onnx"))
    nodes = [node for file in files for node in model_of(made.out, file).graph.node]
    assert any(node.domain == "com.microsoft" for node in nodes)
    assert sorted(path.name for path in made.out.glob("*.onnx.data")) == [f"{file}.data" for file in files]
    holds(made)
    if family == "llama":
        assert greedy.decoder(made.out, SEVENTH, 8).tolist() == from_torch(made.delta, prompts(2)).tolist()


@pytest.mark.slow
def test_without_a_cache_a_decoder_is_one_plain_graph(exported: Make) -> None:
    made = exported("llama", "mam", cache=False)
    inputs, outputs = ports(made.out / "model.onnx")
    assert (list(inputs), list(outputs)) == (["input_ids", "attention_mask", "position_ids"], ["logits"])
    assert not (made.out / "genai_config.json").exists()
    holds(made)


@pytest.mark.slow
def test_bfloat16_is_refused_with_what_to_pass_and_exports_as_fp32(saved: Save, tmp_path: Path) -> None:
    base, _ = saved("llama", "lora")
    small = tmp_path / "base"
    transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(small)
    import peftc

    model: Any = peftc.apply("lora", small, set={"r": 2})
    with torch.no_grad():
        for name in model.surgery.plan.parameters:
            model.get_parameter(name).normal_(std=0.2)
    model.save_pretrained(tmp_path / "delta")
    with pytest.raises(PeftcError) as refused:
        driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"})
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "E043" and "bfloat16" in diagnostic.message
    assert diagnostic.help is not None and "--dtype fp32" in diagnostic.help and "--dtype fp16" in diagnostic.help
    assert not (tmp_path / "out").exists()
    report = driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"}, dtype="float32")
    assert all(c.holds and c.absolute < 1e-4 * max(1.0, c.scale) for c in report.comparisons)


@pytest.mark.parametrize("opset", [17, 26, 27])
def test_an_opset_that_would_be_invalid_is_refused_before_anything_is_written(
    opset: int, saved: Save, tmp_path: Path
) -> None:
    with pytest.raises(PeftcError) as refused:
        driver.merge(saved("llama", "mam")[1], tmp_path / "out", export={"onnx"}, opset=opset)
    assert refused.value.diagnostics[0].code == "E014" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--opset", "20"], ["--dtype", "fp16"], ["--optimize", "ort"], ["--no-cache"]])
def test_options_of_onnx_without_onnx_are_told(option: list[str]) -> None:
    result = CliRunner().invoke(app, ["merge", "nowhere", *option])
    assert result.exit_code == 2 and f"`{option[0]}` is an option of ONNX exports" in result.stderr


KEYS = {"bos_token_id", "context_length", "decoder", "eos_token_id", "pad_token_id", "type", "vocab_size"}


def test_the_genai_config_names_what_the_graph_has(exported: Make) -> None:
    made = exported("llama", "mam")
    document = json.loads((made.out / "genai_config.json").read_text())
    inputs, outputs = ports(made.out / "model.onnx")
    model, decoder = document["model"], document["model"]["decoder"]
    assert set(document) == {"model", "search"} and set(model) == KEYS
    assert (model["type"], model["vocab_size"], model["eos_token_id"], model["pad_token_id"]) == ("llama", 99, 2, 1)
    assert (made.out / decoder["filename"]).exists()
    layers = range(decoder["num_hidden_layers"])
    expand = {True: lambda text: [text % i for i in layers], False: lambda text: [text]}
    named = [name for text in decoder["inputs"].values() for name in expand["%d" in text](text)]
    assert sorted(named) == sorted(inputs)
    assert sorted(n for t in decoder["outputs"].values() for n in expand["%d" in t](t)) == sorted(outputs)
    assert inputs["past_key_values.0.key"][1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]
    assert document["search"]["past_present_share_buffer"] is False
    assert document["search"]["max_length"] == model["context_length"] == 2048
    assert all(isinstance(value, (int, float, bool)) for value in document["search"].values())


def test_config_and_generation_config_lie_beside_the_graph(exported: Make) -> None:
    out = exported("llama", "mam").out
    assert transformers.AutoConfig.from_pretrained(out).model_type == "llama"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert not list(out.glob("*.safetensors"))
    assert np.isclose(json.loads((out / "certificate.json").read_text())["onnx"]["opset"], 20)
