"""What is written: heads, shards, dtypes, untouched bytes; and what is refused before anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fold.conftest import Checkpoints
from fold.support import Merged, adapt, fold, load_plain, merge, outputs, rule, tiny
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import read_bytes


def raw(directory: Path) -> dict[str, bytes]:
    return {name: read_bytes(header, name) for name, (header, _) in ModelDir.open(directory).tensors.items()}


def test_a_trained_head_that_the_base_lacks_is_merged_with_it(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = merge("lora", checkpoint("bert"), tmp_path, set={"r": 2}, head="sequence-classification", num_labels=3)
    assert type(found.plain).__name__ == "BertForSequenceClassification"
    assert found.difference <= 1e-10
    head = found.adapted.classifier
    assert head.weight.shape == (3, 16)
    assert torch.equal(found.plain.classifier.weight, head.weight)
    assert torch.equal(found.plain.classifier.bias, head.bias)


def test_a_delta_on_a_head_that_the_base_lacks_is_merged_too(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = fold("bitfit", checkpoint("bert"), tmp_path, head="sequence-classification", num_labels=3)
    assert found.difference <= 1e-10
    assert not torch.equal(found.plain.classifier.bias, found.adapted.classifier.bias)


def test_a_head_with_other_labels_replaces_the_stored_one(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification(tiny("bert").config).double()
    base.save_pretrained(tmp_path / "base")
    found = fold("lora", tmp_path / "base", tmp_path, set={"r": 2}, head="sequence-classification", num_labels=5)
    assert found.plain.classifier.weight.shape == (5, 16)
    assert found.difference <= 1e-10


def test_shards_stay_shards_and_what_no_delta_names_keeps_every_byte(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    found = merge("lora", tmp_path / "base", tmp_path, set={"r": 2})
    assert found.difference <= 1e-10
    assert sorted(path.name for path in found.out.glob("*.safetensors")) == shards
    before, after = raw(found.base), raw(found.out)
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {f"encoder.layer.{i}.attention.self.{n}.weight" for i in range(2) for n in ("query", "value")}
    assert found.certificate["checkpoint"]["changed"] == len(moved)
    index = json.loads((found.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(len, after.values()))


def test_a_widened_checkpoint_may_be_sharded(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    found = fold("pa_ffn", tmp_path / "base", tmp_path, set={"r": 3, "f": "gelu"})
    assert found.difference <= 1e-10


def test_bfloat16_merges_in_float32_with_one_rounding(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert", torch.bfloat16)
    found = merge("lora", base, tmp_path, set={"r": 3, "alpha": 6.0})
    deltas = found.adapted.state_dict()
    for layer in range(2):
        path = f"encoder.layer.{layer}.attention"
        for name, tap in (("query", "q"), ("value", "v")):
            old = ModelDir.open(base).read(f"{path}.self.{name}.weight")
            a, b = (deltas[f"{path}.peftc.lora.{tap}.{part}"] for part in ("A", "B"))
            assert a.dtype == torch.float32 and old.dtype == torch.bfloat16
            expected = (old.float() + 2.0 * (b @ a)).to(torch.bfloat16)
            assert torch.equal(ModelDir.open(found.out).read(f"{path}.self.{name}.weight"), expected)
    assert found.plain.dtype == torch.bfloat16


NO_NUMBER = {"not a number": (float("nan"), "peftc.lora.v.B"), "too large": (3e38, "self.value.weight")}


@pytest.mark.parametrize("case", NO_NUMBER)
def test_a_delta_that_yields_no_number_is_refused_and_leaves_no_directory(
    case: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    value, place = NO_NUMBER[case]
    model = adapt("lora", checkpoint("bert", torch.float32), set={"r": 2})
    with torch.no_grad():
        model.get_parameter("encoder.layer.1.attention.peftc.lora.v.B")[0] = value
    model.save_pretrained(tmp_path / "delta")
    with pytest.raises(PeftcError) as refused:
        driver.merge(tmp_path / "delta", tmp_path / "merged", export={"hf"})
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "E042" and f"encoder.layer.1.attention.{place}" in diagnostic.message
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_a_prefix_from_an_mlp_is_constant_in_onnx_and_its_mlp_is_gone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = merge("prefix_mlp", checkpoint("bert", torch.float32), tmp_path, frozenset({"onnx"}), set={"l": 3, "m": 5})
    assert found.results == {"prefix": {"constant"}}
    names = _initializers(found)
    assert not [name for name in names if name.endswith((".E", ".W_1", ".b_1", ".W_2", ".b_2"))]
    assert sum(".peftc." in name for name in names) == 4
    assert all(c["holds"] and c["absolute"] <= 1e-4 for c in found.certificate["comparisons"])


def test_a_widened_and_a_kept_delta_share_an_onnx_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    text = """hyper: {r: 3}
deltas:
  wide: {at: ffn, modify: out, insert: parallel, form: bottleneck, with: {f: gelu_tanh}, where: {layers: [0]}}
  kept: {at: ffn, modify: out, insert: parallel, form: bottleneck}
  lora: {at: attention, modify: [q, k], insert: parallel, form: low_rank}"""
    found = merge(rule(text), checkpoint("gpt2", torch.float32), tmp_path, frozenset({"onnx"}))
    assert found.results == {"wide": {"widened"}, "kept": {"kept"}, "lora": {"merged"}}
    names = _initializers(found)
    assert {name.split(".peftc.")[1].split(".")[0] for name in names if ".peftc." in name} == {"kept"}
    assert all(c["holds"] for c in found.certificate["comparisons"])


def _initializers(found: Merged) -> set[str]:
    import onnx

    model = onnx.load(str(found.out / "model.onnx"), load_external_data=False)
    return {tensor.name for tensor in model.graph.initializer}


def test_a_merged_checkpoint_can_be_adapted_again(checkpoint: Checkpoints, tmp_path: Path) -> None:
    first = fold("scaled_pa", checkpoint("bert"), tmp_path / "first", set={"r": 3, "f": "gelu"})
    second = fold("lora_ffn", first.out, tmp_path / "second", set={"r": 2})
    assert second.difference <= 1e-10
    assert second.plain.config.intermediate_size == 27
    assert len(outputs(load_plain(second.out))) == len(outputs(first.plain))
