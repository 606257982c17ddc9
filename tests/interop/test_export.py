"""Rules of the library as adapters of PEFT and of vLLM; what has no place in the format is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from badinput.command import refused, run
from safetensors.torch import load_file

pytest.importorskip("peft")

from interop.round_trip import apart
from interop.subjects import loaded, model, says
from peftc import driver
from peftc.interop.export import export_adapter
from peftc.runtime.api import apply


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bases")
    for family in ("llama", "gpt2", "bert"):
        model(family).save_pretrained(place / family)
    return place


def adapted(rule: str, base: Path, place: Path, **values: object) -> Any:
    """A model with trained deltas, saved at `place`."""
    ours = apply(rule, base, set=values)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ours.surgery.plan.trainable:
            parameter = ours.get_parameter(name)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    ours.save_pretrained(place)
    return ours.eval()


@pytest.mark.parametrize(
    ("rule", "family", "values"),
    [("lora", "llama", {"r": 4}), ("lora_linear", "gpt2", {"r": 3, "alpha": 7.0}), ("lora_ffn", "llama", {"r": 4})],
)
def test_rule_of_the_library_exports_to_what_peft_computes(
    rule: str, family: str, values: dict[str, object], bases: Path, tmp_path: Path
) -> None:
    ours = adapted(rule, bases / family, tmp_path / "delta", **values)
    export_adapter(tmp_path / "delta", tmp_path / "adapter")
    with torch.no_grad():
        theirs = loaded(family, tmp_path / "adapter")
        assert apart(says(ours), says(theirs)) <= 1e-10
        assert apart(says(ours), says(model(family))) > 1e-2


@pytest.mark.parametrize(
    ("rule", "family", "reason"),
    [
        ("pfeiffer", "llama", "no method of PEFT computes form `bottleneck`"),
        ("lora", "gpt2", "`q` of self attention transformer.h.0.attn is not the whole output of a linear layer"),
        ("bitfit", "bert", "no method of PEFT computes form `vector`"),
    ],
)
def test_delta_that_does_not_fit_is_refused_by_name(
    rule: str, family: str, reason: str, bases: Path, tmp_path: Path
) -> None:
    driver.apply(rule, bases / family, tmp_path / "delta")
    said = refused("E083", "export", tmp_path / "delta", "-o", tmp_path / "adapter")
    assert reason in said
    assert not (tmp_path / "adapter").exists()


def test_adapter_for_vllm_meets_its_published_rules(bases: Path, tmp_path: Path) -> None:
    """The rules by hand, from vLLM's `PEFTHelper` and its loader of LoRA weights."""
    adapted("lora_linear", bases / "llama", tmp_path / "delta", r=8)
    assert run("export", tmp_path / "delta", "--to", "vllm", "-o", tmp_path / "adapter").code == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512) and config["lora_alpha"] == 16.0
    assert config.get("bias", "none") == "none" and not config.get("modules_to_save")
    assert not config.get("use_dora") and not config.get("rank_pattern") and not config.get("alpha_pattern")
    targets = config["target_modules"]
    assert isinstance(targets, list)
    halves: dict[str, set[str]] = {}
    for name, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.")
        *path, half, weight = name.removeprefix("base_model.model.").split(".")
        assert weight == "weight" and half in ("lora_A", "lora_B") and path[-1] in targets
        assert value.shape[0 if half == "lora_A" else 1] == config["r"]
        halves.setdefault(".".join(path), set()).add(half)
    assert all(both == {"lora_A", "lora_B"} for both in halves.values())


def test_what_vllm_does_not_load_is_refused(bases: Path, tmp_path: Path) -> None:
    rule = tmp_path / "mine.yaml"
    rule.write_text("peftc: 1\nname: mine\nextends: lora\ntrain: [lm_head.weight]\n")
    adapted(str(rule), bases / "llama", tmp_path / "delta")
    said = refused("E083", "export", tmp_path / "delta", "--to", "vllm", "-o", tmp_path / "adapter")
    assert "modules_to_save" in said


def test_module_that_trains_in_part_is_refused(bases: Path, tmp_path: Path) -> None:
    rule = tmp_path / "mine.yaml"
    rule.write_text("peftc: 1\nname: mine\nextends: lora\ntrain: [bert.pooler.dense.weight]\n")
    adapted(str(rule), bases / "bert", tmp_path / "delta")
    said = refused("E083", "export", tmp_path / "delta", "-o", tmp_path / "adapter")
    assert "bert.pooler.dense.weight and not bert.pooler.dense.bias" in said
