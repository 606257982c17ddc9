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
from peftc.plan import make_plan
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
def located(bart: Path) -> Program:
    """The program of BART-large with its sites, traced once: a plan reads it and changes nothing."""
    cls, config = resolve(ModelDir.open(bart).config, bart, None, None)
    skeleton = build_skeleton(cls, config)
    return analyse(skeleton, default_inputs(skeleton.model))


def plan(rule: str, directory: Path, **hyper: object):
    return driver.plan(rule, directory, {name: str(value) for name, value in hyper.items()}).plan


def test_mam_on_bart_large_is_6_74_percent(bart: Path) -> None:
    found = plan("mam", bart, l=30, r=512, bias="false")
    assert found.trained_count == found.stored_count == 27_377_664
    assert found.base_count == BART_LARGE_PARAMETERS
    assert round(found.percent, 2) == 6.74
    assert (len(found.sites_of("prefix")), len(found.sites_of("adapter"))) == (36, 24)


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


def test_mam_on_roberta_base(tmp_path: Path) -> None:
    directory = config_only(tmp_path / "model", ROBERTA_BASE)
    found = plan("mam", directory, l=16, r=16, bias="false")
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
