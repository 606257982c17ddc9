"""Safetensors files: what is written is what the library would write, and a damaged file is named, never read."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from peftc.diagnostics import PeftcError
from peftc.store import safetensors_io as io

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


def _values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 2, shape).to(dtype)


def _specs(tensors: dict[str, torch.Tensor]) -> list[io.TensorSpec]:
    return [io.TensorSpec(name, io.dtype_code(value.dtype), tuple(value.shape)) for name, value in tensors.items()]


def _mixed() -> dict[str, torch.Tensor]:
    tensors = {f"z{i}.{str(dtype)[6:]}": _values(dtype, (3, 5)) for i, dtype in enumerate(DTYPES)}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "größe": torch.arange(3)}


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t.reshape(-1) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def _error(path: Path) -> str:
    with pytest.raises(PeftcError) as caught:
        io.read_header(path)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E031"
    assert str(path) in diagnostic.message
    assert diagnostic.help
    return diagnostic.message


def _with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(begin: int, end: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}


def test_written_file_is_byte_for_byte_the_library_s(tmp_path: Path) -> None:
    tensors = _mixed()
    path = tmp_path / "model.safetensors"
    io.write(path, _specs(tensors), tensors.__getitem__, {"format": "pt"})
    assert path.read_bytes() == save(tensors, {"format": "pt"})


def test_written_file_is_read_back_identical_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "t": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.ones(3, dtype=torch.float16),
        "i": torch.arange(3),
    }
    path = tmp_path / "model.safetensors"
    io.write(path, _specs(tensors), tensors.__getitem__, {"format": "pt"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(_same_bits(file.get_tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_of_every_dtype_is_read_as_the_library_wrote_it(dtype: torch.dtype, tmp_path: Path) -> None:
    value = _values(dtype, (4, 3))
    path = tmp_path / "model.safetensors"
    save_file({"other": torch.ones(7), "value": value}, path)
    header = io.read_header(path)
    assert header.tensors["value"].shape == (4, 3)
    assert _same_bits(io.read_tensor(header, "value"), value)
    assert io.read_bytes(header, "value") == bytes(value.contiguous().view(torch.uint8).reshape(-1).tolist())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_set_of_tensors_survives_the_round_trip(tmp_path: Path, drawn: dict[str, tuple]) -> None:
    tensors = {name: _values(dtype, tuple(shape)) for name, (dtype, shape) in drawn.items()}
    path = tmp_path / "model.safetensors"
    io.write(path, _specs(tensors), tensors.__getitem__)
    header = io.read_header(path)
    assert set(header.tensors) == set(tensors)
    assert all(_same_bits(io.read_tensor(header, name), value) for name, value in tensors.items())
    assert set(load_file(path)) == set(tensors)


def test_writer_holds_one_tensor_at_a_time_and_reports_progress(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    most, seen = 0, []

    def produce(name: str) -> torch.Tensor:
        nonlocal most
        value = torch.full((1000,), float(name))
        alive.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in alive))
        return value

    specs = [io.TensorSpec(str(i), "F32", (1000,)) for i in range(10)]
    io.write(tmp_path / "m.safetensors", specs, produce, progress=lambda done, total: seen.append((done, total)))
    assert most == 1
    assert seen == [(4000 * (i + 1), 40_000) for i in range(10)]


def test_raw_bytes_are_copied_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    io.write(path, [io.TensorSpec("w", "BF16", (2,))], lambda _: memoryview(b"\x00\x01\x02\x03"))
    assert io.read_bytes(io.read_header(path), "w", 1, 2) == b"\x01\x02"


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, dtype=torch.float16), b"12345"], ids=str)
def test_tensor_other_than_announced_is_a_bug_and_raises(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        io.write(tmp_path / "m.safetensors", [io.TensorSpec("w", "F32", (2,))], lambda _: value)


def test_header_is_read_without_torch(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    code = "import sys; from peftc.store.model_dir import ModelDir; from peftc.store.atomic import atomic_directory"
    code += f"\nfrom peftc.store.safetensors_io import read_header; read_header({str(tmp_path / 'm.safetensors')!r})"
    code += "\nsys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_truncated_file_is_named_with_the_tensor_that_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(10), "b": torch.ones(10)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    message = _error(path)
    assert "truncated" in message
    assert "`b`" in message


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = save({"a": torch.ones(10), "b": torch.ones(3, dtype=torch.int8)})
    for size in range(len(whole)):
        (tmp_path / "m.safetensors").write_bytes(whole[:size])
        _error(tmp_path / "m.safetensors")


def test_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(10)}, path)
    header = io.read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(PeftcError, match=r"E031.*became shorter"):
        io.read_tensor(header, "a")


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "too short"),
    "header longer than the file": (lambda p: p.write_bytes((99).to_bytes(8, "little") + b"{" * 9), "truncated"),
    "absurd header length": (lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f" + b"{" * 9), "no safetensors file"),
    "pickle": (lambda p: p.write_bytes(b"PK\x03\x04" + b"\x00" * 100), "no safetensors file"),
    "git lfs pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "Git LFS pointer",
    ),
    "not json": (lambda p: _with_header(p, b"{no json"), "not valid JSON"),
    "deep json": (lambda p: _with_header(p, b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "not utf-8": (lambda p: _with_header(p, b'{"\xff":1}'), "not valid JSON"),
    "name twice": (lambda p: _with_header(p, b'{"a":{"dtype":"U8"},"a":{}}'), "`a` is there twice"),
    "entry no object": (lambda p: _with_header(p, {"a": 3}), "not a JSON object"),
    "unknown dtype": (lambda p: _with_header(p, {"a": _entry(0, 4, "Q9")}, b"1234"), "unknown dtype"),
    "negative shape": (
        lambda p: _with_header(p, {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"1"),
        "bad shape",
    ),
    "size against shape": (
        lambda p: _with_header(p, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        "needs 8 bytes",
    ),
    "overlap": (lambda p: _with_header(p, {"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456"), "overlaps"),
    "gap": (lambda p: _with_header(p, {"a": _entry(0, 2), "b": _entry(4, 6)}, b"123456"), "belong to no tensor"),
    "tail": (lambda p: _with_header(p, {"a": _entry(0, 2)}, b"123456"), "belong to no tensor"),
    "metadata": (lambda p: _with_header(p, {"__metadata__": {"a": 1}}), "__metadata__"),
    "directory": (lambda p: p.mkdir(), "cannot be read"),
    "absent": (lambda p: None, "cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_saying_what_is_wrong(case: str, tmp_path: Path) -> None:
    damage, expected = DAMAGED[case]
    damage(tmp_path / "m.safetensors")
    assert expected in _error(tmp_path / "m.safetensors")
