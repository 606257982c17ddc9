"""Weights go from the checkpoint into the ONNX file a block at a time, folded on the way, under their own names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from exporting.conftest import Make, Save
from peftc import driver
from peftc.backends import onnx_weights
from peftc.backends.onnx_pieces import run_in_pieces
from peftc.backends.onnx_run import OnnxGraph
from peftc.backends.onnx_weights import FoldedWeights
from peftc.diagnostics import PeftcError
from peftc.fold.state import FoldedState
from peftc.merging import comparing_onnx
from peftc.store.model_dir import ModelDir


def initializers(directory: Path) -> dict[str, np.ndarray]:
    model = onnx.load(str(directory / "model.onnx"))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_initializers_have_the_names_and_the_bytes_of_the_merged_checkpoint(
    tied: bool, exported: Make, tmp_path: Path
) -> None:
    made = exported("llama", "lora", {"tie_word_embeddings": tied})
    driver.merge(made.delta, tmp_path / "merged")
    merged, found = ModelDir.open(tmp_path / "merged"), initializers(made.out)
    assert found.keys() - merged.tensors.keys() == {"model.rotary_emb.inv_freq"}  # computed from the config, not stored
    assert merged.tensors.keys() - found.keys() == set()
    for name in merged.tensors:
        assert np.array_equal(found[name], merged.read(name).numpy()), name
    size = (made.out / "model.onnx.data").stat().st_size
    large = [tensor.nbytes for tensor in found.values() if tensor.nbytes > 256]
    assert sum(large) <= size < sum(large) + 64 * len(large)  # nothing twice


@pytest.mark.slow
def test_blocks_of_a_few_numbers_give_the_same_file(
    saved: Save, exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported("gpt2", "lora")
    monkeypatch.setattr(onnx_weights, "BLOCK", 300)
    driver.merge(whole.delta, tmp_path / "out", export={"onnx"})
    before, after = initializers(whole.out), initializers(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)


def test_a_model_run_in_pieces_answers_as_the_whole(exported: Make) -> None:
    graph = OnnxGraph(exported("llama", "mam").out / "model.onnx", large=False)
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(2, -1)}
    batch |= graph.no_past(2)
    whole = list(graph([batch])[0].values())
    for most in (1, 20_000):  # a weight a piece, and a few
        one, other = run_in_pieces(graph.path, [batch, {name: value[:1] for name, value in batch.items()}], most)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, whole, strict=True))
        assert all(torch.allclose(a, b[:1], atol=1e-5) for a, b in zip(other, whole, strict=True))


@pytest.mark.slow
def test_the_certificate_of_a_large_model_is_that_of_a_small_one(
    exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = exported("llama", "lora", {"tie_word_embeddings": True})
    monkeypatch.setattr(comparing_onnx, "WHOLE", 0)
    driver.merge(small.delta, tmp_path / "out", export={"onnx"})
    made = type(small)(small.base, small.delta, tmp_path / "out")
    before, after = small.certificate["comparisons"], made.certificate["comparisons"]
    assert [c["inputs"] for c in before] == [c["inputs"] for c in after]
    for one, other in zip(before, after, strict=True):
        assert other["holds"] and other["absolute"] < 1e-4
        assert other["scale"] == pytest.approx(one["scale"], rel=1e-5)


def test_the_file_holds_no_path_of_the_machine_it_was_made_on(exported: Make) -> None:
    text = (exported("llama", "mam").out / "model.onnx").read_bytes()
    assert b"site-packages" not in text and b"/peftc/" not in text


def test_a_number_that_float16_does_not_hold_is_named() -> None:
    weights = FoldedWeights(FoldedState({}.__getitem__, []), None, {"w": torch.tensor([1.0, -1e5])})  # pyright: ignore[reportArgumentType]
    assert torch.equal(next(weights.blocks("w", (2,), torch.float32)), torch.tensor([1.0, -1e5]))
    with pytest.raises(PeftcError) as refused:
        list(weights.blocks("w", (2,), torch.float16))
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "E042" and "w holds numbers up to 1e+05" in diagnostic.message
    assert diagnostic.help is not None and "--dtype fp32" in diagnostic.help


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_told_before_a_weight_is_written(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, delta = saved("gpt2", "lora")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PeftcError) as refused:
        driver.merge(delta, tmp_path / "out", export={"onnx"})
    assert refused.value.diagnostics[0].code == "E036" and not list(tmp_path.iterdir())
