"""`peftc unmerge` gives back the files of the base, byte for byte, without the base and without the delta."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fold.conftest import Checkpoints
from fold.support import adapt, rule, tiny
from fold.test_widen import GATED
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.merging import undo
from peftc.store.residual import decode, encode

LORA: dict[str, Any] = {"r": 2, "alpha": 4.0}
TWICE = rule("""deltas:
  q: {at: attention, modify: q, form: low_rank, with: {r: 2}, insert: parallel}
  down: {at: linear, where: {role: down}, modify: weight, form: low_rank_weight, with: {r: 2}}
  wide: {at: ffn, modify: out, insert: parallel, form: bottleneck, with: {r: 3, f: gelu}, where: {layers: [1]}}""")

VOCABULARY = rule("""deltas:
  table: {at: embedding, where: {role: token}, modify: weight, form: low_rank_weight, with: {r: 2}}
  head: {at: linear, where: {path: lm_head}, modify: out, form: low_rank, with: {r: 2}}""")

CASES: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "fused, transposed": ("gpt2", torch.bfloat16, "lora", {"set": LORA}),
    "every linear": ("llama", torch.float16, "lora_linear", {"set": LORA}),
    "float32": ("bert", torch.float32, "lora", {"set": LORA}),
    "float64": ("bert", torch.float64, "lora", {"set": LORA}),
    "the input's side": ("opt", torch.float32, "houlsby", {"set": {"r": 3, "f": "identity"}}),
    "a new weight": ("bert", torch.bfloat16, "dora", {"set": {"r": 2}}),
    "widened, gate and up in one": ("phi3", torch.bfloat16, GATED, {}),
    "widened, transposed": ("gpt2", torch.bfloat16, "scaled_pa", {"set": {"r": 3, "f": "gelu_tanh"}}),
    "several, in some layers": ("bert", torch.bfloat16, TWICE, {}),
    "a new head": ("bert", torch.float32, "lora", {"set": LORA, "head": "sequence-classification", "num_labels": 3}),
    "rows of the vocabulary": ("llama", torch.bfloat16, "trainable_tokens", {"set": {"ids": [3, 7]}}),
    "tensors trained as they are": ("bert", torch.bfloat16, "bitfit", {}),
    "factors of a vocabulary": ("llama", torch.bfloat16, VOCABULARY, {}),
}


def merged(case: str, checkpoint: Checkpoints, place: Path) -> tuple[Path, Path]:
    """The base and what it was merged into."""
    family, dtype, source, options = CASES[case]
    base = checkpoint(family, dtype)
    adapt(source, base, **options).save_pretrained(place / "delta")
    driver.merge(place / "delta", place / "merged", outputs=False, undo=True)
    shutil.rmtree(place / "delta")
    return base, place / "merged"


@pytest.fixture(scope="module")
def undone(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return merged("float32", checkpoint, tmp_path_factory.mktemp("undone"))


SLOW = ("every linear", "float64", "the input's side", "widened, transposed", "tensors trained as they are")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_the_bases_files_come_back_byte_for_byte(
    case: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo, "BLOCK", 100)
    base, directory = merged(case, checkpoint, tmp_path)
    before = contents(base)
    assert before["model.safetensors"] != (directory / "model.safetensors").read_bytes()
    report = driver.unmerge(directory, tmp_path / "again")
    assert report.restored > 0
    assert contents(tmp_path / "again") == before
    assert driver.verify(directory, base=base).files == 1


def test_shards_and_their_index_come_back(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = contents(tmp_path / "base")
    adapt("lora", tmp_path / "base", set=LORA).save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "merged", outputs=False, undo=True, max_shard=50_000)
    (tmp_path / "base").rename(tmp_path / "gone")
    driver.unmerge(tmp_path / "merged", tmp_path / "again")
    assert len(before) > 4 and contents(tmp_path / "again") == before


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_one_table_for_tokens_and_head_comes_back(tied: str, tmp_path: Path) -> None:
    """The vocabulary was resized, so it is no multiple of anything."""
    base = tiny("gpt2")
    base.resize_token_embeddings(67, mean_resizing=False)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    before = contents(tmp_path / "base")
    rows = rule(
        "deltas: {t: {at: embedding, where: {role: token}, modify: weight, form: low_rank_weight, with: {r: 2}}}"
    )
    adapt(rows, tmp_path / "base").save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "merged", outputs=False, undo=True, tied=tied)
    driver.unmerge(tmp_path / "merged", tmp_path / "again")
    assert contents(tmp_path / "again") == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16, torch.float32, torch.float64])
def test_a_residual_holds_any_difference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(bits)
    true, guess = (torch.randint(limits.min, limits.max, (37, 5), generator=generator, dtype=bits) for _ in range(2))
    guess[:20] = true[:20]
    kept = b"".join(encode(true.view(dtype), guess.view(dtype)))
    found = decode(guess.view(dtype), io.BytesIO(kept).read)
    assert found.dtype == dtype and torch.equal(found.view(bits), true)
    with pytest.raises(EOFError):
        decode(guess.view(dtype), io.BytesIO(kept[:-1]).read)


def test_sums_of_rounded_factors_do_not_depend_on_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    wild = torch.exp(3 * torch.randn(1, 300, generator=generator, dtype=torch.float64))
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 300), (300, 50)))
    exact = undo.exact_factors((left * wild, right / wild.t()))
    order = torch.randperm(300, generator=generator)
    one, other = exact[0] @ exact[1], exact[0][:, order] @ exact[1][order]
    assert torch.equal(one, other)
    assert not torch.equal(left @ right, left[:, order] @ right[order])
    for factor, rounded in zip((left * wild, right / wild.t()), exact, strict=True):
        assert torch.equal(rounded.float().double(), rounded)
        assert float((factor - rounded).abs().max() / factor.abs().max()) < 2**-20


def test_a_guess_by_factors_leaves_little_to_keep(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = adapt("lora_linear", tmp_path / "base", set={"r": 1})
    with torch.no_grad():
        for name in model.surgery.plan.parameters:
            model.get_parameter(name).mul_(0.02)
    model.save_pretrained(tmp_path / "delta")
    report = driver.merge(tmp_path / "delta", tmp_path / "merged", outputs=False, undo=True)
    assert report.checkpoint is not None
    assert sum(change.changed for change in report.checkpoint.changes) == 6
    with zipfile.ZipFile(tmp_path / "merged" / "undo.zip") as archive:
        kept = sum(entry.compress_size for entry in archive.infolist() if entry.filename.endswith(".rest"))
    assert kept < 0.06 * 2 * (4 * 128 * 128 + 2 * 128 * 512)


def rewritten(directory: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """undo.zip with another entry of that name."""
    with zipfile.ZipFile(directory / "undo.zip") as archive:
        entries = {one: archive.read(one) for one in archive.namelist()}
    entries[name] = change(entries[name])
    with zipfile.ZipFile(directory / "undo.zip", "w") as archive:
        for one, data in entries.items():
            archive.writestr(one, data)


def unmerging(directory: Path, out: Path) -> str:
    with pytest.raises(PeftcError) as refused:
        driver.unmerge(directory, out)
    (diagnostic,) = refused.value.diagnostics
    assert not out.exists()
    return f"{diagnostic.code}: {diagnostic.message} ({diagnostic.help})"


def test_what_was_not_kept_is_not_made_up(undone: tuple[Path, Path], tmp_path: Path) -> None:
    base, directory = undone[0], Path(shutil.copytree(undone[1], tmp_path / "merged"))
    kept = (directory / "undo.zip").read_bytes()
    (directory / "undo.zip").write_bytes(kept[: len(kept) // 2])
    assert "E034" in unmerging(directory, tmp_path / "again")
    (directory / "undo.zip").unlink()
    told = unmerging(directory, tmp_path / "again")
    assert "merged without --undo" in told and f"the base was {base}" in told
    (directory / "undo.zip").write_bytes(kept)
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)
    told = unmerging(directory, tmp_path / "again")
    assert told.startswith("E054") and "model.safetensors does not come back as it was" in told


def test_a_shard_that_is_gone_or_cut_short_is_named(undone: tuple[Path, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(undone[1], tmp_path / "merged"))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert unmerging(directory, tmp_path / "again").startswith(f"E031: {weights}: the file is truncated")
    weights.unlink()
    assert unmerging(directory, tmp_path / "again").startswith(f"E030: {directory} holds no weights")


def test_the_undo_of_another_merge_is_told(undone: tuple[Path, Path], checkpoint: Checkpoints, tmp_path: Path) -> None:
    _, other = merged("several, in some layers", checkpoint, tmp_path)
    shutil.copy(undone[1] / "undo.zip", other / "undo.zip")
    told = unmerging(other, tmp_path / "again")
    assert told.startswith(f"E054: {other}: ") and "does not come back as it was" in told and "the base was" in told


@pytest.mark.parametrize("record", ["version", "offset"])
def test_an_archive_that_cannot_be_read_is_no_fault_of_the_destination(
    record: str, undone: tuple[Path, Path], tmp_path: Path
) -> None:
    """The version of zip that the first entry asks for, and where the archive says that its directory begins."""
    directory = Path(shutil.copytree(undone[1], tmp_path / "merged"))
    data = bytearray((directory / "undo.zip").read_bytes())
    if record == "version":
        data[data.index(b"PK\x01\x02") + 6] = 99
    else:
        data[-6:-2] = (int.from_bytes(data[-6:-2], "little") + (1 << 24)).to_bytes(4, "little")
    (directory / "undo.zip").write_bytes(data)
    assert unmerging(directory, tmp_path / "again").startswith(f"E034: {directory / 'undo.zip'}")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda raw: raw[:5], "no safetensors file"),
        (lambda raw: raw[:9] + b"!" + raw[10:], "not valid JSON"),
        (lambda raw: raw.replace(b'"F32"', b'"F32\xff"', 1), "not valid JSON"),
        (lambda raw: (len(raw) * 9).to_bytes(8, "little") + raw[8:], "truncated"),
        (lambda raw: raw.replace(b"F32", b"F64", 1), "needs"),
    ],
)
def test_a_damaged_header_is_named_by_its_entry(
    change: Callable[[bytes], bytes], cause: str, undone: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not by the file that it was written to, which is gone when the message is read."""
    directory = Path(shutil.copytree(undone[1], tmp_path / "merged"))
    rewritten(directory, "headers/model.safetensors", change)
    told = unmerging(directory, tmp_path / "again")
    assert told.startswith(f"E034: {directory / 'undo.zip'}, headers/model.safetensors is damaged: ")
    assert cause in told and ".again" not in told


def test_what_no_merge_wrote_is_said_to_be_so(undone: tuple[Path, Path], tmp_path: Path) -> None:
    told = unmerging(undone[0], tmp_path / "again")
    assert told.startswith("E034") and "no merge wrote it" in told


@pytest.mark.parametrize("end", ["undo.json", "model.safetensors", ".left", ".rest"])
def test_a_damaged_entry_is_named(end: str, undone: tuple[Path, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(undone[1], tmp_path / "merged"))
    place = directory / "undo.zip"
    with zipfile.ZipFile(place) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith(end))
        entries = {name: archive.read(name) for name in archive.namelist()}
    data = bytearray(place.read_bytes())
    begin = entry.header_offset + 30 + len(entry.filename)
    data[begin : begin + entry.compress_size] = bytes(entry.compress_size)
    place.write_bytes(data)
    told = unmerging(directory, tmp_path / "again")
    assert told.startswith("E034") and f"undo.zip, {entry.filename} is damaged" in told
    with zipfile.ZipFile(place, "w") as archive:
        for name in entries.keys() - {entry.filename}:
            archive.writestr(name, entries[name])
    assert f"{entry.filename} is damaged: There is no item named" in unmerging(directory, tmp_path / "again")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"file": "../model.safetensors", "bytes": 10, "sha256": ""}]},
        {"files": {"../config.json": {"kept": True, "sha256": ""}}},
        {"tensors": {"pooler.dense.bias": {"entry": "0", "axis": 0, "streams": 0, "rank": 1 << 40}}},
        {"tensors": {"pooler.dense.bias": {"entry": "none", "whole": True}}},
        {"tensors": {"pooler.dense.bias": 5}},
        {"tensors": {"pooler.dense.bias": {"entry": "0", "axis": 0.5, "streams": 0, "rank": 0}}},
        {"tensors": []},
        {"shards": []},
        {"shards": [{"file": "model.safetensors", "bytes": float("inf"), "sha256": ""}]},
        {"shards": [{"file": "model.safetensors", "bytes": -1, "sha256": ""}]},
        {"files": {"config.json": None}},
        {"format": 2},
    ],
)
def test_an_undo_of_a_stranger_writes_nowhere_else(
    change: dict[str, Any], undone: tuple[Path, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(undone[1], tmp_path / "merged"))
    rewritten(directory, "undo.json", lambda kept: json.dumps({**json.loads(kept), **change}).encode())
    before = set(tmp_path.rglob("*"))
    assert "E034" in unmerging(directory, tmp_path / "again")
    assert set(tmp_path.rglob("*")) == before
