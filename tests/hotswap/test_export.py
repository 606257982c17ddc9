"""`peftc merge DIR... --export onnx --adapters`: what is written, what shares inputs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from fold.support import tiny
from typer.testing import CliRunner

from hotswap.conftest import ADAPTERS, Served
from hotswap.support import delta
from peftc import driver
from peftc.cli import app
from peftc.diagnostics import PeftcError
from peftc.ort import read_adapter


def test_loras_of_every_rank_and_scale_share_inputs_and_other_structures_have_their_own(served: Served) -> None:
    structures = {adapter.name: adapter.structure for adapter in served.report.adapters}
    assert structures == {"narrow": "lora", "wide": "lora", "rs": "lora", "houlsby": "houlsby", "mam": "mam"}
    shapes = {name: read_adapter(served.directory / f"{name}.onnx_adapter").shapes for name in ADAPTERS}
    assert shapes["narrow"].keys() == shapes["wide"].keys() == shapes["rs"].keys()
    assert not shapes["wide"].keys() & shapes["houlsby"].keys()
    down = "encoder.layer.1.attention.lora.lora.v.A"
    assert [shapes[name][down] for name in ("narrow", "wide", "rs")] == [(1, 16), (5, 16), (3, 16)]


def test_defaults_of_open_sizes_have_no_entries(served: Served) -> None:
    model = onnx.load(str(served.directory / "model.onnx"), load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    optional = {value.name: tuple(value.dims) for value in model.graph.initializer if value.name in inputs}
    assert len(optional) == served.report.optional
    assert optional["encoder.layer.0.attention.lora.lora.q.A"] == (0, 16)
    assert optional["encoder.layer.0.houlsby.ffn.W_up"] == (16, 0)
    assert optional["encoder.layer.0.attention.mam.prefix.P_k"] == (0, 4, 4)
    assert optional["encoder.layer.0.attention.lora.lora.q.number_0"] == (1,)


def test_the_index_says_what_was_compared(served: Served) -> None:
    index = json.loads((served.directory / "adapters.json").read_text())
    assert list(index["adapters"]) == list(ADAPTERS)
    for comparisons in (index["comparisons"], *(entry["comparisons"] for entry in index["adapters"].values())):
        assert comparisons
        assert all(comparison["holds"] and comparison["absolute"] < 1e-5 for comparison in comparisons)


def test_verify_finds_a_file_that_is_not_what_was_written(served: Served, tmp_path: Path) -> None:
    copy = shutil.copytree(served.directory, tmp_path / "copy")
    assert driver.verify(copy).files == len(ADAPTERS) + 2
    for name in ("model.onnx", "model.onnx.data", "wide.onnx_adapter"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(PeftcError, match=rf"E054.*{name}: it is not the file"):
            driver.verify(copy)
        (copy / name).write_bytes(whole)
    (copy / "rs.onnx_adapter").unlink()
    with pytest.raises(PeftcError, match=r"E054.*rs.onnx_adapter"):
        driver.verify(copy)


def test_deltas_of_other_bases_and_directories_of_one_name_are_refused(served: Served, tmp_path: Path) -> None:
    other = tmp_path / "base"
    model = tiny("bert").to(torch.float32)
    with torch.no_grad():
        model.pooler.dense.bias.add_(1)
    model.save_pretrained(other)
    apart = delta("lora", other, tmp_path / "apart", {"r": 2})
    with pytest.raises(PeftcError, match=r"E093.*another base"):
        driver.export_adapters([served.deltas["wide"], apart], tmp_path / "out")
    twin = tmp_path / "twin" / "wide"
    twin.parent.mkdir()
    twin.symlink_to(served.deltas["wide"])
    again = tmp_path / "wide"
    again.mkdir()
    for file in served.deltas["rs"].iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    with pytest.raises(PeftcError, match=r"E093.*called wide"):
        driver.export_adapters([served.deltas["wide"], again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_without_a_neutral_form_is_refused_by_name(served: Served, tmp_path: Path) -> None:
    prompt = delta("prompt", served.base, tmp_path / "prompt", {"l": 3})
    with pytest.raises(PeftcError, match=r"E090.*prompt.*makes the sequence longer"):
        driver.export_adapters([served.deltas["wide"], prompt], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "folds one delta directory"),
        (["a", "--adapters"], "for ONNX alone"),
        (["a", "--adapters", "--export", "onnx", "--undo"], "`--undo` says how to merge"),
        (["a", "--adapters", "--export", "onnx", "--dtype", "fp16"], "`--dtype` says how to merge"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["merge", *arguments])
    assert result.exit_code == 2
    assert "E014" in result.output and message in result.output
