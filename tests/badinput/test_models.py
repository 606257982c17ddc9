"""Model directories that cannot be adapted: said before anything is traced, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from badinput.command import refused, run, snapshot


def edit_config(base: Path, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no config": ("E030", lambda base: (base / "config.json").unlink(), "there is no config.json"),
    "config cut short": ("E030", lambda base: cut(base / "config.json", 40), "not valid JSON"),
    "config of nothing": ("E030", lambda base: (base / "config.json").write_text("{}"), "names no model_type"),
    "unknown model type": ("E032", lambda base: edit_config(base, model_type="brt"), "did you mean `bert`?"),
    "unknown class": ("E032", lambda base: edit_config(base, architectures=["Bort"]), "no architecture `Bort`"),
    "quantized": ("E055", lambda base: edit_config(base, quantization_config={"quant_method": "gptq"}), "quantized"),
    "pickled weights": (
        "E030",
        lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "write them as safetensors",
    ),
    "weights cut short": ("E031", lambda base: cut(base / "model.safetensors", 1000), "the file is truncated"),
    "weights of junk": (
        "E031",
        lambda base: (base / "model.safetensors").write_bytes(b"junk" * 99),
        "this is no safetensors file",
    ),
    "empty weights": ("E031", lambda base: (base / "model.safetensors").write_bytes(b""), "too short (0 bytes)"),
    "a Git LFS pointer": (
        "E031",
        lambda base: (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 2),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("command", ["apply", "plan", "sites"])
def test_spoiled_model_directory_is_refused(base: Path, place: Path, command: str, name: str) -> None:
    code, spoil, words = SPOILED[name]
    spoil(base)
    told = refused(code, command, *([] if command == "sites" else ["mam"]), base)
    assert words in told
    assert str(base) in told or "brt" in told
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", [name for name, (code, _, _) in SPOILED.items() if code == "E031"])
def test_merge_refuses_spoiled_base_weights(base: Path, delta: Path, place: Path, name: str) -> None:
    code, spoil, words = SPOILED[name]
    spoil(base)
    assert words in refused(code, "merge", delta, "--base", base)
    assert not list(place.iterdir())


def test_missing_directory_is_refused_with_a_near_name(base: Path, place: Path) -> None:
    assert "did you mean `base`?" in refused("E030", "apply", "mam", base.with_name("bsae"))


def test_a_file_is_no_model_directory(base: Path, place: Path) -> None:
    assert "is a file, not a model directory" in refused("E030", "apply", "mam", base / "config.json")


def test_a_base_without_weights_can_be_adapted_but_not_merged(base: Path, place: Path) -> None:
    (base / "model.safetensors").unlink()
    assert run("apply", "lora", base, "-q").code == 0
    assert "holds no weights" in refused("E030", "merge")
    assert [entry.name for entry in place.iterdir()] == ["peftc-out"]


@pytest.mark.parametrize("out", ["elsewhere", None])
def test_adapted_directory_is_not_adapted_again(delta: Path, place: Path, out: str | None) -> None:
    before = snapshot(delta)
    told = refused("E033", "apply", "mam", delta, "-o", out or delta)
    assert "already adapted" in told
    assert "peftc merge" in told
    assert snapshot(delta) == before
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--head", "sequence-clasification"], "did you mean `sequence-classification`?"),
        (["--head", "seq2seq-lm"], "bert has: base, causal-lm"),
        (["--head", "base", "--num-labels", "3"], "BertModel has no labels to count"),
        (["--num-labels", "99999999"], "from 1 to"),
    ],
)
def test_wrong_head_is_refused(tiny: Path, place: Path, options: list[str], words: str) -> None:
    assert words in refused("E032", "apply", "mam", tiny, *options)
    assert not list(place.iterdir())


@pytest.mark.parametrize("options", [["--num-labels", "0"], ["--num-labels", "x"], ["--frce"], ["--seed", "x"]])
def test_wrong_options_are_told_with_usage(tiny: Path, place: Path, options: list[str]) -> None:
    told = run("apply", "mam", tiny, *options)
    assert told.code == 2
    assert options[0] in told.stderr
    assert not list(place.iterdir())
