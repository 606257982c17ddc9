"""Delta directories that are not whole, or belong to another base; destinations that must not be written to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from badinput.command import refused, run, snapshot
from peftc import driver

Tensors = dict[str, torch.Tensor]
A = "bert.encoder.layer.0.attention.peftc.lora.q.A"


def edit(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def put(value: float) -> Callable[[Path], object]:
    return lambda delta: edit(delta / "delta.safetensors", lambda t: t[A].view(-1)[:1].fill_(value))


def manifest(text: str) -> Callable[[Path], object]:
    return lambda delta: (delta / "peftc.json").write_text(text)


def without(key: str) -> Callable[[Path], object]:
    def change(delta: Path) -> None:
        document = json.loads((delta / "peftc.json").read_text())
        del document["base"][key]
        (delta / "peftc.json").write_text(json.dumps(document))

    return change


SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing tensor": (
        "E040", lambda d: edit(d / "delta.safetensors", lambda t: t.pop(A)), f"{A} is missing",
    ),
    "extra tensor": (
        "E040", lambda d: edit(d / "delta.safetensors", lambda t: t.update(foo=torch.ones(2))), "foo belongs to no",
    ),
    "wrong shape": (
        "E040", lambda d: edit(d / "delta.safetensors", lambda t: t.update({A: torch.ones(3)})),
        "is [3], and the rule says [8, 32]",
    ),
    "whole numbers": (
        "E040", lambda d: edit(d / "delta.safetensors", lambda t: t.update({A: t[A].long()})), "is I64, not a float",
    ),
    "NaN": ("E042", put(float("nan")), "holds NaN or infinity"),
    "infinity": ("E042", put(float("inf")), "holds NaN or infinity"),
    "no tensors": ("E031", lambda d: (d / "delta.safetensors").unlink(), "No such file"),
    "tensors cut short": (
        "E031", lambda d: os.truncate(d / "delta.safetensors", 4000), "the file is truncated",
    ),
    "no manifest": ("E034", lambda d: (d / "peftc.json").unlink(), "holds no peftc.json"),
    "manifest cut short": ("E034", manifest('{"format": 1, "ba'), "cannot be read"),
    "manifest of a list": ("E034", manifest("[]"), "another format"),
    "manifest of the future": ("E034", manifest('{"format": 99}'), "use the peftc that wrote it"),
    "manifest without base": ("E034", manifest('{"format": 1}'), "`base.path` is missing"),
    "manifest without seed": ("E034", without("seed"), "`base.seed` is missing"),
    "manifest without fingerprint": ("E034", without("parts"), "`base.parts` is missing"),
    "no rule": ("E034", lambda d: (d / "rule.yaml").unlink(), "holds no rule.yaml"),
    "rule that is no text": ("E034", lambda d: (d / "rule.yaml").write_bytes(b"\xff\xfe\0"), "cannot be read"),
    "rule that is wrong": ("E009", lambda d: (d / "rule.yaml").write_text("[]"), "rule.yaml:1:1"),
    "rule of another method": (
        "E040",
        lambda d: (d / "rule.yaml").write_text(
            "peftc: 1\nname: b\ndeltas:\n  b: {at: norm, modify: bias, form: {expr: v, params: {v: {shape: [d_out], "
            "init: zeros}}}}\n"
        ),
        "must come from one and the same save",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_delta_directory_is_refused(delta: Path, place: Path, name: str) -> None:
    code, spoil, words = SPOILED[name]
    spoil(delta)
    before = snapshot(delta)
    assert words in refused(code, "merge", delta)
    assert snapshot(delta) == before
    assert not list(place.iterdir())


def test_nan_that_no_fold_touches_is_refused_in_onnx_too(tiny: Path, tmp_path: Path, place: Path) -> None:
    driver.apply("mam", tiny, tmp_path / "mam", sets={"l": 2, "r": 3})
    name = "bert.encoder.layer.0.attention.peftc.prefix.P_v"
    edit(tmp_path / "mam" / "delta.safetensors", lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))
    assert f"{name} holds NaN" in refused("E042", "merge", tmp_path / "mam", "--export", "onnx")
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base: _config(base, hidden_act="relu"), "the config"),
        (
            lambda base: edit(base / "model.safetensors", lambda t: t["classifier.bias"].add_(1)),
            "the contents of tensors",
        ),
        (
            lambda base: edit(base / "model.safetensors", lambda t: t.pop("classifier.bias")),
            "the names, dtypes or shapes",
        ),
    ],
    ids=["config", "contents", "names"],
)
def test_another_base_is_refused(
    base: Path, delta: Path, place: Path, change: Callable[[Path], object], words: str
) -> None:
    change(base)
    told = refused("E035", "merge", delta, "--base", base)
    assert words in told
    assert "--base" in told
    assert not list(place.iterdir())


def _config(base: Path, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_base_that_is_gone_is_asked_for(base: Path, tmp_path: Path, place: Path) -> None:
    driver.apply("lora", base, tmp_path / "out")
    base.rename(tmp_path / "moved")
    assert "--base MODEL_DIR" in refused("E030", "merge", tmp_path / "out")
    refused("E030", "merge", tmp_path / "out", "--base", "nowhere")
    assert run("merge", tmp_path / "out", "--base", tmp_path / "moved", "-q", "--allow-unchanged").code == 0


def test_a_delta_directory_is_no_base(delta: Path, place: Path) -> None:
    refused("E033", "merge", delta, "--base", delta)


def test_what_is_no_delta_directory_is_not_merged(base: Path, place: Path) -> None:
    assert "peftc apply RULE MODEL_DIR" in refused("E034", "merge")
    assert "holds no peftc.json" in refused("E034", "merge", base)


def test_unknown_export_is_refused(delta: Path, place: Path) -> None:
    told = run("merge", delta, "--export", "onx")
    assert told.code == 2
    assert "onnx" in told.stderr


@pytest.mark.parametrize("command", ["apply", "merge"])
def test_what_peftc_did_not_write_is_never_replaced(tiny: Path, base: Path, delta: Path, command: str) -> None:
    before = snapshot(base), snapshot(delta)
    arguments = ["lora", base] if command == "apply" else [delta, "--base", tiny]
    refused("E036", command, *arguments, "-o", base)
    refused("E036", command, *arguments, "-o", base / "config.json")
    refused("E036", command, *arguments, "-o", base / "config.json" / "out")
    refused("E036", command, *arguments, "-o", ".")
    assert (snapshot(base), snapshot(delta)) == before


def test_merge_into_its_own_delta_directory_is_refused(delta: Path) -> None:
    before = snapshot(delta)
    assert "is the delta directory itself" in refused("E036", "merge", delta, "-o", delta)
    assert snapshot(delta) == before


def test_deltas_saved_from_a_model_are_not_applied_over(tiny: Path, delta: Path) -> None:
    import peftc

    assert run("apply", "lora", tiny, "-o", delta, "-q").code == 0, "what apply itself wrote may be written again"
    peftc.load(delta).save_pretrained(delta)
    before = snapshot(delta)
    assert "would lose them" in refused("E036", "apply", "lora", tiny, "-o", delta)
    assert snapshot(delta) == before


def test_saved_bytes_depend_on_nothing_but_the_arguments(tiny: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        driver.apply("lora", tiny, tmp_path / name, seed=5)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
