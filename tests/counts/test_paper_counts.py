"""The paper's parameter counts (He et al. 2022, tables 2 and 3), on shapes: no weight is allocated or stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peftc import driver
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.program import Program
from peftc.lang.loader import load_rule
from peftc.pipeline import analyse
from peftc.planning.plan import make_plan
from peftc.store.heads import resolve
from peftc.store.model_dir import ModelDir

BART_LARGE = {
    "architectures": ["BartForConditionalGeneration"], "model_type": "bart", "vocab_size": 50265, "d_model": 1024,
    "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "max_position_embeddings": 1024, "activation_function": "gelu",
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514,
    "type_vocab_size": 1, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART_LARGE_PARAMETERS = 406_291_456
"""facebook/bart-large as transformers counts it: tied embeddings once, learned positions for 1026 places."""


def config_only(directory: Path, config: dict[str, object]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_only(tmp_path_factory.mktemp("bart") / "model", BART_LARGE)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_only(tmp_path_factory.mktemp("roberta") / "model", ROBERTA_BASE)


@pytest.fixture(scope="module")
def located(bart: Path) -> Program:
    """The program of BART-large with its sites, traced once: a plan reads it and changes nothing."""
    cls, config = resolve(ModelDir.open(bart).config, bart, None, None)
    skeleton = build_skeleton(cls, config)
    return analyse(skeleton, default_inputs(skeleton.model))


def plan(rule: str, directory: Path, **hyper: object):
    return driver.plan(rule, directory, {name: str(value) for name, value in hyper.items()}).plan


def test_mam_on_bart_large_is_6_74_percent(bart: Path) -> None:
    """With its biases, 24 times 512 and 1024, which train and are stored and which the paper does not count."""
    report = driver.plan("mam", bart, {"l": 30, "r": 512})
    counts, found = report.counts, report.plan
    assert counts.trained == counts.stored == 27_377_664 + 24 * (512 + 1024)
    assert counts.paper == 27_377_664
    assert counts.base == BART_LARGE_PARAMETERS
    assert counts.describe() == "stores 27,414,528; by the paper's convention 27,377,664 (6.74 %)"
    assert (len(found.sites_of("prefix")), len(found.sites_of("adapter"))) == (36, 24)


@pytest.mark.parametrize(
    ("rule", "hyper", "stored", "count"),
    [
        ("prefix_mlp", {"l": 16, "m": 800}, None, 12 * 2 * 16 * 768),  # the MLP is dropped after training
        pytest.param("p_tuning", {}, None, 20 * 768, marks=pytest.mark.slow),
        pytest.param("houlsby", {"r": 16}, None, 24 * 2 * 16 * 768, marks=pytest.mark.slow),
        ("mh_pa", {"r": 4}, None, 12 * (12 * 4 * 768 + 768 * 4)),
        ("vera", {"r": 16}, 24 * (16 + 768) + 2 * 2 * 16 * 768, 24 * (16 + 768)),  # of which the matrices are frozen
        pytest.param("bitfit", {}, None, 12 * (7 * 768 + 3072) + 3 * 768 + 50265, marks=pytest.mark.slow),
    ],
)
def test_what_a_method_adds_to_roberta_base_as_the_paper_counts(
    roberta: Path, rule: str, hyper: dict[str, object], stored: int | None, count: int
) -> None:
    counts = driver.plan(rule, roberta, hyper).counts
    assert counts.paper == count
    assert counts.stored == (stored or counts.trained)


def test_a_model_tells_the_counts_that_its_plan_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    import transformers

    import peftc

    small = {**ROBERTA_BASE, "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**small, "num_attention_heads": 4})  # pyright: ignore[reportArgumentType]
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    model = peftc.apply("mam", tmp_path, set={"l": 3, "r": 4})
    counts = model.parameter_counts()
    assert counts == driver.plan("mam", tmp_path, {"l": 3, "r": 4}).counts
    assert (counts.trained, counts.paper) == (counts.paper + 2 * (4 + 24), 2 * (2 * 3 * 24 + 2 * 4 * 24))
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.print_trainable_parameters()
    assert counts.describe() in capsys.readouterr().out
    report = driver.plan("lora", tmp_path, {"r": 2}, head="sequence-classification", num_labels=3)
    head = 24 * 24 + 24 + 24 * 3 + 3  # it trains and is stored; a head is no part of a method
    assert report.counts.paper == 2 * 2 * 2 * 2 * 24
    assert report.to_json()["trained"] == report.to_json()["stored"] == report.counts.paper + head


@pytest.mark.parametrize(
    ("rule", "hyper", "count"),
    [
        ("prefix", {"l": 200}, 14_745_600),
        ("pa_ffn", {"r": 512, "bias": "false"}, 25_165_824),
        ("lora_ffn", {"r": 102}, 25_067_520),
    ],
)
def test_counts_on_bart_large(rule: str, hyper: dict[str, object], count: int, located: Program) -> None:
    found = make_plan(load_rule(rule, hyper), located)
    assert found.trained_count == found.stored_count == count


def test_mam_on_roberta_base(roberta: Path) -> None:
    found = plan("mam", roberta, l=16, r=16, bias="false")
    assert found.trained_count == found.stored_count == 589_824


def test_apply_stores_what_the_plan_counts_and_no_base_weight(bart: Path, tmp_path: Path) -> None:
    from peftc.store.safetensors_io import read_header

    driver.apply("mam", bart, tmp_path / "out", sets={"l": "30", "r": "512", "bias": "false"})
    header = read_header(tmp_path / "out" / "delta.safetensors")
    sizes = [info.shape for info in header.tensors.values()]
    assert sum(_product(shape) for shape in sizes) == 27_377_664
    assert all(re.search(r"\.peftc\.(prefix|adapter)\.", name) for name in header.tensors)
    counts = json.loads((tmp_path / "out" / "peftc.json").read_text())["counts"]
    assert counts == {
        "trained": 27_377_664, "stored": 27_377_664, "base": BART_LARGE_PARAMETERS, "percent": 6.7384,
    }  # fmt: skip


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
