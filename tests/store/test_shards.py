"""Shards are the same bytes on any number of threads, and an error in one tensor ends the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftc.store.safetensors_io import TensorSpec, as_bytes, read_header
from peftc.store.shards import Piece, Shard, resharded, same_layout, write_shards

ROWS = 64


def tensors(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"t{number}": torch.randn(ROWS, 8 + number, generator=generator) for number in range(count)}


def doubled(held: dict[str, torch.Tensor], spec: TensorSpec) -> Iterator[memoryview]:
    for first in range(0, ROWS, 16):
        yield as_bytes(2 * held[spec.name][first : first + 16])


def planned(base: Path, held: dict[str, torch.Tensor], most: int | None) -> list[Shard]:
    """Every third tensor is copied."""
    header = read_header(base)
    specs = {name: TensorSpec(name, info.dtype, info.shape) for name, info in header.tensors.items()}
    copied = set(list(held)[::3])
    pieces = {name: Piece(spec, header if name in copied else None) for name, spec in specs.items()}
    return same_layout([header], pieces) if most is None else resharded(pieces.values(), most, {"format": "pt"})


@pytest.mark.parametrize("most", [None, 9000], ids=["one file", "several"])
@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_written_is_copied_or_produced_on_any_number_of_threads(
    threads: int, most: int | None, tmp_path: Path
) -> None:
    held = tensors(12)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    seen: list[tuple[int, int]] = []
    shards = planned(tmp_path / "model.safetensors", held, most)
    write_shards(
        tmp_path / "out", shards, lambda spec: doubled(held, spec), lambda *done: seen.append(done), threads=threads
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(shards) and (most is None or len(files) > 2)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    copied = set(list(held)[::3])
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert torch.equal(found[name], tensor if name in copied else 2 * tensor), name
    total = sum(tensor.nbytes for tensor in held.values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1] == (total, total)


def test_an_error_in_one_tensor_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    held = tensors(6)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    failed = threading.Event()

    def produce(spec: TensorSpec) -> Iterator[memoryview]:
        if spec.name == "t1":
            failed.set()
            raise OSError(28, "no space")
        failed.wait()
        yield from doubled(held, spec)

    before = threading.active_count()
    with pytest.raises(OSError, match="no space"):
        write_shards(
            tmp_path / "out",
            planned(tmp_path / "model.safetensors", held, None),
            produce,
            threads=3,
        )
    assert threading.active_count() == before
