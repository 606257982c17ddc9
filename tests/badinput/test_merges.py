"""What may go wrong in a merge: a damaged shard is named, a full disk is told before, two writers lose nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from badinput.command import refused, run, snapshot
from peftc import driver
from peftc.backends import hf
from peftc.store import shards
from peftc.store.model_dir import INDEX, ModelDir

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
MERGE = ("--certify", "tensors", "--allow-unchanged", "-q")


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`tiny` in several shards, and a delta of it."""
    place = tmp_path_factory.mktemp("sharded")
    headers = ModelDir.open(tiny).headers
    pieces = [
        shards.Piece(shards.TensorSpec(i.name, i.dtype, i.shape), header)
        for header in headers
        for i in header.tensors.values()
    ]
    (place / "base").mkdir()
    shutil.copy(tiny / "config.json", place / "base")
    shards.write_shards(place / "base", shards.resharded(pieces, 20_000, {"format": "pt"}), lambda *_: iter(()))
    driver.apply("lora", place / "base", place / "delta")
    return place / "base", place / "delta"


def shard_of(base: Path, name: str = QUERY) -> Path:
    return base / json.loads((base / INDEX).read_text())["weight_map"][name]


def flip(base: Path) -> str:
    header, info = ModelDir.open(base).tensors[QUERY]
    data = bytearray(header.path.read_bytes())
    data[info.begin + 1] ^= 4
    header.path.write_bytes(data)
    return f"the contents of tensors, {QUERY}, in {header.path.name}"


def cut(base: Path) -> str:
    os.truncate(shard_of(base), shard_of(base).stat().st_size - 8)
    return f"{shard_of(base).name}: the file is truncated"


def remove(base: Path) -> str:
    shard_of(base).unlink()
    return f"lacks 1 of {len(set(json.loads((base / INDEX).read_text())['weight_map'].values()))} shards"


def misplace(base: Path) -> str:
    index = json.loads((base / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][QUERY])
    index["weight_map"][QUERY] = other
    (base / INDEX).write_text(json.dumps(index))
    return "places 1 tensors in files that lack them"


def forget(base: Path) -> str:
    index = json.loads((base / INDEX).read_text())
    del index["weight_map"][QUERY]
    (base / INDEX).write_text(json.dumps(index))
    return "does not list 1 tensors of its shards"


def enlarge(base: Path) -> str:
    file = shard_of(base)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F64"', 1))
    return f"{file.name}: "


DAMAGED: dict[str, tuple[str, Callable[[Path], str]]] = {
    "a flipped bit": ("E035", flip),
    "cut short": ("E031", cut),
    "missing": ("E031", remove),
    "in another shard than the index says": ("E031", misplace),
    "not in the index": ("E031", forget),
    "a header that disagrees with its sizes": ("E031", enlarge),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_shard_is_named_before_anything_is_written(
    case: str, sharded: tuple[Path, Path], tmp_path: Path, place: Path
) -> None:
    base = Path(shutil.copytree(sharded[0], tmp_path / "base"))
    code, damage = DAMAGED[case]
    words = damage(base)
    told = refused(code, "merge", sharded[1], "--base", base, *MERGE)
    assert words in told
    assert not list(place.iterdir())


def test_no_number_in_the_base_is_told_by_the_merged_tensors_name(tiny: Path, tmp_path: Path, place: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors[QUERY][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    driver.apply("lora", base, tmp_path / "delta")
    assert f"the merged {QUERY} holds NaN" in refused("E042", "merge", tmp_path / "delta", *MERGE)
    assert not list(place.iterdir())


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(
    lora: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(hf, "write_shards", lambda *_: pytest.fail("something was written"))
    assert "1000 bytes are free" in refused("E036", "merge", lora, *MERGE)
    assert not list(place.iterdir())


def test_a_second_writer_of_one_destination_loses_nothing(
    lora: Path, tiny: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one merge writes, another of the same destination comes to its end."""
    assert run("merge", lora, "-o", tmp_path / "alone", *MERGE).code == 0
    original = hf.write_shards

    def write(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(hf, "write_shards", original)
        assert run("merge", lora, "-o", "out", *MERGE).code == 0
        assert snapshot(place / "out") == snapshot(tmp_path / "alone")
        original(*args, **kwargs)

    monkeypatch.setattr(hf, "write_shards", write)
    assert run("merge", lora, "-o", "out", *MERGE).code == 0
    assert snapshot(place / "out") == snapshot(tmp_path / "alone")
    assert [entry.name for entry in place.iterdir()] == ["out"]


def test_a_destination_that_appears_meanwhile_and_is_not_peftcs_is_left_alone(
    lora: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hf.write_shards

    def write(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        (place / "out").mkdir()
        (place / "out" / "mine.txt").write_text("mine")

    monkeypatch.setattr(hf, "write_shards", write)
    refused("E036", "merge", lora, "-o", "out", *MERGE)
    assert snapshot(place) == {"out/mine.txt": b"mine"}


def test_numbers_beyond_the_stored_dtype_are_told(lora: Path, tiny: Path, tmp_path: Path, place: Path) -> None:
    delta = Path(shutil.copytree(lora, tmp_path / "delta"))
    tensors = load_file(delta / "delta.safetensors")
    for name, value in tensors.items():
        tensors[name] = torch.full_like(value, 1e30)
    save_file(tensors, delta / "delta.safetensors", {"format": "pt"})
    assert "holds NaN or infinity" in refused("E042", "merge", delta, *MERGE)
    assert not list(place.iterdir())
