"""A merge in blocks of rows: the same bytes as the whole tensor's, a record of every change, and its later check."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fold.conftest import Checkpoints
from fold.support import adapt, merge, tiny
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.fold import stream
from peftc.merging import comparing
from peftc.merging.adapted import Adapted
from peftc.runtime import streamed
from peftc.runtime.delta_dir import TENSORS
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import read_header, read_tensor

LORA: dict[str, Any] = {"r": 2, "alpha": 4.0}


def saved(rule: str, base: Path, place: Path, **options: Any) -> Path:
    adapt(rule, base, **options).save_pretrained(place / "delta")
    return place / "delta"


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(PeftcError) as refused:
        driver.merge(*args, **kwargs)
    (diagnostic,) = refused.value.diagnostics
    return f"{diagnostic.code}: {diagnostic.message}"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


# A fused and a transposed projection, a fused one with heads apart, a sequential adapter (input and output sides).
CASES = {"gpt2": ("lora", LORA), "phi3": ("lora_linear", LORA), "opt": ("houlsby", {"r": 3, "f": "identity"})}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_of_a_row_or_two_give_the_bytes_of_whole_tensors(
    family: str, dtype: torch.dtype, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, hyper = CASES[family]
    delta = saved(rule, checkpoint(family, dtype), tmp_path, set=hyper)
    driver.merge(delta, tmp_path / "whole", outputs=False)
    monkeypatch.setattr(stream, "BLOCK", 40)
    driver.merge(delta, tmp_path / "blocks", outputs=False)
    before, after = ModelDir.open(tmp_path / "whole"), ModelDir.open(tmp_path / "blocks")
    tolerance = 1e-14 if dtype == torch.float64 else 0.0
    for name in before.tensors:
        one, other = before.read(name), after.read(name)
        assert torch.allclose(one, other, rtol=0, atol=tolerance), name


def test_a_shard_that_no_delta_names_is_the_same_file_and_others_keep_their_headers(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    driver.merge(saved("lora", tmp_path / "base", tmp_path, set=LORA), tmp_path / "merged", outputs=False)
    before, after = files(tmp_path / "base"), files(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert any(before[name] == after[name] for name in before)
    for name, old in before.items():
        length = 8 + int.from_bytes(old[:8], "little")
        assert after[name][:length] == old[:length]
    index = "model.safetensors.index.json"
    assert (
        json.loads((tmp_path / "merged" / index).read_text())["weight_map"]
        == (json.loads((tmp_path / "base" / index).read_text())["weight_map"])
    )


def test_the_certificate_records_every_tensor(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = merge("lora", checkpoint("bert", torch.bfloat16), tmp_path, set=LORA)
    before, after = ModelDir.open(found.base), ModelDir.open(found.out)
    entries = {entry["name"]: entry for entry in found.certificate["tensors"]}
    assert entries.keys() == found.changed()
    assert found.certificate["untouched"] == len(after.tensors) - len(entries)
    deltas = found.adapted.state_dict()
    for layer in range(2):
        path = f"encoder.layer.{layer}.attention"
        name = f"{path}.self.query.weight"
        entry, old, new = entries[name], before.read(name), after.read(name)
        assert entry["sha256_before"] == sha256(old) and entry["sha256_after"] == sha256(new)
        change = 2.0 * (deltas[f"{path}.peftc.lora.q.B"] @ deltas[f"{path}.peftc.lora.q.A"])
        exact = old.double() + change.double()
        assert entry["change"] == pytest.approx(float(change.double().norm()), rel=1e-5)
        assert entry["rounding"] == pytest.approx(float((new.double() - exact).norm()), rel=1e-4)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_a_fold_may_be_computed_in_float64(checkpoint: Checkpoints, tmp_path: Path) -> None:
    delta = saved("lora", checkpoint("bert", torch.float32), tmp_path, set=LORA)
    driver.merge(delta, tmp_path / "merged", precision="float64", outputs=False)
    header = read_header(delta / TENSORS)
    base, merged = ModelDir.open(checkpoint("bert", torch.float32)), ModelDir.open(tmp_path / "merged")
    path = "encoder.layer.0.attention"
    a, b = (read_tensor(header, f"{path}.peftc.lora.q.{part}").double() for part in ("A", "B"))
    name = f"{path}.self.query.weight"
    assert torch.equal(merged.read(name), (base.read(name).double() + 2.0 * (b @ a)).float())


def test_shards_of_another_size_hold_the_same_tensors(checkpoint: Checkpoints, tmp_path: Path) -> None:
    delta = saved("lora", checkpoint("bert"), tmp_path, set=LORA)
    driver.merge(delta, tmp_path / "one", outputs=False)
    driver.merge(delta, tmp_path / "many", max_shard=9000, outputs=False)
    one, many = ModelDir.open(tmp_path / "one"), ModelDir.open(tmp_path / "many")
    assert len(many.headers) > 3
    assert all(len(h.tensors) == 1 or sum(i.nbytes for i in h.tensors.values()) <= 9000 for h in many.headers)
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_a_merge_that_changes_nothing_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert", torch.bfloat16)
    driver.apply("lora", base, tmp_path / "untrained", sets=LORA)
    told = refusal(tmp_path / "untrained", tmp_path / "merged")
    assert told.startswith("E049: the merge changes nothing") and "untrained" in told
    model = adapt("lora", base, set=LORA)
    with torch.no_grad():
        for name in model.surgery.plan.parameters:
            model.get_parameter(name).mul_(1e-5)
    model.save_pretrained(tmp_path / "small")
    assert "lost in rounding to BF16" in refusal(tmp_path / "small", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    driver.merge(tmp_path / "untrained", tmp_path / "merged", allow_unchanged=True, outputs=False)
    assert (tmp_path / "merged" / "certificate.json").exists()


def test_a_dry_run_says_what_would_be_written(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert")
    found = driver.merge_schedule(saved("lora", base, tmp_path, set=LORA)).to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    (shard,) = found["shards"]
    assert len(shard["folded"]) == 4 and not set(shard["folded"]) & set(shard["copied"])
    assert found["bytes"] == ModelDir.open(base).nbytes


FROM_DISK = {
    "bert": ("lora", LORA),
    "bart": ("lora_ffn", {"r": 3}),
    "gpt2": ("lora", LORA),
    "llama": ("lora_linear", LORA),
}


@pytest.mark.parametrize("family", FROM_DISK)
def test_a_large_model_is_compared_from_disk(
    family: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, hyper = FROM_DISK[family]
    delta = saved(rule, checkpoint(family, torch.float32), tmp_path, set=hyper)
    in_memory = driver.merge(delta, tmp_path / "merged").comparisons
    monkeypatch.setattr(comparing, "WHOLE", 0)
    monkeypatch.setattr(streamed, "_BLOCK", 100)  # a few rows of a weight at a time
    monkeypatch.setattr(Adapted, "model", property(lambda _: pytest.fail("the model was loaded")))
    adapted = Adapted.open(delta, None)
    from_disk = comparing.compare_checkpoint(adapted, tmp_path / "merged")
    assert all(c.holds and c.absolute <= 1e-5 for c in from_disk)
    scales = [c.scale for c in in_memory if c.dtype == "float32"]
    assert [c.scale for c in from_disk] == pytest.approx(scales, rel=1e-5)
    assert {c.top1 for c in from_disk} <= ({None} if family == "bert" else {1.0})
    spoil(tmp_path / "merged")
    assert not all(c.holds for c in comparing.compare_checkpoint(adapted, tmp_path / "merged"))


def spoil(directory: Path) -> None:
    """Double the last matrix of the last shard."""
    header = ModelDir.open(directory).headers[-1]
    info = [i for i in header.tensors.values() if len(i.shape) == 2][-1]
    data = bytearray(header.path.read_bytes())
    values = torch.frombuffer(data[info.begin : info.end], dtype=torch.float32) * 2
    data[info.begin : info.end] = values.numpy().tobytes()
    header.path.write_bytes(data)


def flip(directory: Path, name: str) -> None:
    header, info = ModelDir.open(directory).tensors[name]
    data = bytearray(header.path.read_bytes())
    data[info.begin] ^= 1
    header.path.write_bytes(data)


def verification(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(PeftcError) as refused:
        driver.verify(*args, **kwargs)
    return refused.value.diagnostics[0].message


def test_verify_finds_a_flipped_bit_wherever_it_is(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert", torch.float32)
    found = merge("lora", base, tmp_path, frozenset({"hf", "onnx"}), set=LORA)
    report = driver.verify(found.out)
    assert (report.touched, report.untouched, report.unchecked) == (4, len(ModelDir.open(base).tensors) - 4, [])
    assert report.files >= 1
    touched = "encoder.layer.1.attention.self.value.weight"
    for name, words in (
        (touched, "is not the tensor that was written"),
        ("embeddings.LayerNorm.bias", "is not the base's"),
    ):
        flip(found.out, name)
        assert words in verification(found.out) and name in verification(found.out)
        flip(found.out, name)
    (found.out / "model.onnx").write_bytes((found.out / "model.onnx").read_bytes() + b"\0")
    assert "model.onnx" in verification(found.out)


def test_verify_says_what_it_cannot_check(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    driver.merge(saved("lora", tmp_path / "base", tmp_path, set=LORA), tmp_path / "merged", outputs=False)
    (tmp_path / "base").rename(tmp_path / "moved")
    report = driver.verify(tmp_path / "merged")
    assert report.untouched == 0 and "were not checked" in report.unchecked[0]
    assert driver.verify(tmp_path / "merged", base=tmp_path / "moved").untouched > 0
    assert "holds no certificate.json" in verification(tmp_path / "moved")
