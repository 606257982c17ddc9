"""What is saved comes back bit for bit, beside whatever else the directory holds, and never over a model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc import driver
from peftc.diagnostics import PeftcError
from runtime.tiny import batch, moved, seq2seq_batch

Load = Callable[..., Any]
MAM = {"l": 3, "r": 4}


def logits(model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(given or batch())).logits


@pytest.fixture(scope="module")
def trained(model_dir: Load) -> Any:
    """A BERT with a head that its checkpoint lacks; every trained tensor has moved. Nobody may change it."""
    options: dict[str, Any] = {"head": "sequence-classification", "num_labels": 5}
    return moved(peftc.apply("mam", model_dir("bert-base"), set=MAM, **options))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "bart"])
def test_reloaded_model_answers_bit_for_bit(model_dir: Load, tmp_path: Path, name: str) -> None:
    model = moved(peftc.apply("mam", model_dir(name), set=MAM))
    model.save_pretrained(tmp_path / "out")
    given = seq2seq_batch() if name == "bart" else batch()
    assert torch.equal(logits(peftc.load(tmp_path / "out"), **given), logits(model, **given))


def test_trained_new_head_is_saved_and_reloaded(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again = peftc.load(tmp_path)
    assert torch.equal(again.classifier.weight, trained.classifier.weight)
    assert torch.equal(logits(again), logits(trained))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (len(stored["id2label"]), stored["architectures"]) == (5, ["BertForSequenceClassification"])


def test_saved_directory_is_small_and_complete(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "peftc.json", "rule.yaml", "delta.safetensors", "config.json",
    }  # fmt: skip


def test_saving_keeps_other_files_and_leaves_no_temporary_ones(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_text("mine")
    (tmp_path / "tokenizer.json").write_text("mine")
    trained.save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == "mine"
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_saving_over_another_rules_delta_replaces_it(adapted: Load, trained: Any, tmp_path: Path) -> None:
    adapted("bert").save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    assert torch.equal(logits(peftc.load(tmp_path)), logits(trained))


def test_arguments_of_transformers_are_accepted(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()
    trained.save_pretrained(
        str(tmp_path / "out"), safe_serialization=True, max_shard_size="1GB", save_function=torch.save, variant=None
    )
    assert torch.equal(logits(peftc.load(tmp_path / "out")), logits(trained))


def test_a_given_state_dict_is_what_is_saved(trained: Any, tmp_path: Path) -> None:
    state = {name: torch.zeros_like(value) for name, value in trained.state_dict().items()}
    trained.save_pretrained(tmp_path, state_dict=state)
    assert not peftc.load(tmp_path).classifier.bias.any()
    del state["classifier.bias"]
    with pytest.raises(PeftcError, match=r"E040 error: .* lacks classifier.bias"):
        trained.save_pretrained(tmp_path, state_dict=state)
    assert not peftc.load(tmp_path).classifier.bias.any(), "the failed save left the earlier one"


def test_saving_into_a_model_directory_is_refused(trained: Any, model_dir: Load, plain: Load, tmp_path: Path) -> None:
    config = (model_dir("bert-base") / "config.json").read_bytes()
    with pytest.raises(PeftcError, match=r"E036 .*is the base model itself"):
        trained.save_pretrained(model_dir("bert-base"))
    plain("bert").save_pretrained(tmp_path)
    with pytest.raises(PeftcError, match=r"E036 .*holds a model's weights"):
        trained.save_pretrained(tmp_path)
    assert (model_dir("bert-base") / "config.json").read_bytes() == config
    assert not (tmp_path / "peftc.json").exists()


def test_saving_over_a_file_is_refused(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(PeftcError, match=r"E036 .*is a file"):
        trained.save_pretrained(tmp_path / "out")


def test_failed_save_leaves_the_earlier_one(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftc.runtime.delta_dir.write", full)
    with pytest.raises(PeftcError, match=r"E036 .*No space left on device"):
        trained.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_uploading_is_refused(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=r"E041 error: peftc uploads nothing"):
        trained.save_pretrained(tmp_path, push_to_hub=True)


def test_tokenizer_of_the_base_loads_from_the_delta_directory(model_dir: Load, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    base = shutil.copytree(model_dir("bert"), tmp_path / "base")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(base)
    driver.apply("mam", base, tmp_path / "applied", sets=MAM)
    peftc.load(tmp_path / "applied").save_pretrained(tmp_path / "saved")
    wanted = AutoTokenizer.from_pretrained(base)("hello world")["input_ids"]
    for place in ("applied", "saved"):
        assert AutoTokenizer.from_pretrained(tmp_path / place)("hello world")["input_ids"] == wanted


def test_base_is_found_beside_the_delta_after_both_moved(model_dir: Load, tmp_path: Path) -> None:
    base = shutil.copytree(model_dir("bert"), tmp_path / "here" / "base")
    driver.apply("lora", base, tmp_path / "here" / "out")
    (tmp_path / "here").rename(tmp_path / "there")
    assert logits(peftc.load(tmp_path / "there" / "out")).shape == (3, 3)


def test_moved_base_is_asked_for_and_given(model_dir: Load, tmp_path: Path) -> None:
    base = shutil.copytree(model_dir("bert"), tmp_path / "base")
    driver.apply("lora", base, tmp_path / "out")
    elsewhere = base.rename(tmp_path / "elsewhere")
    with pytest.raises(PeftcError, match=r"E030 .*no longer at .*\n.*--base MODEL_DIR"):
        peftc.load(tmp_path / "out")
    model = peftc.load(tmp_path / "out", base=elsewhere)
    assert logits(model).shape == (3, 3)
    model.save_pretrained(tmp_path / "again")
    assert logits(peftc.load(tmp_path / "again")).shape == (3, 3)


def test_relative_paths_hold_from_another_directory(
    model_dir: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_dir("bert").parent)
    driver.apply("lora", "bert", os.path.relpath(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    assert logits(peftc.load("out")).shape == (3, 3)


def test_applied_directory_loads_as_the_model_that_apply_returns(model_dir: Load, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head": "sequence-classification", "num_labels": 4, "seed": 11}
    driver.apply("mam", model_dir("bert-base"), tmp_path / "out", sets={"l": "3", "r": "4"}, **options)
    one, other = peftc.load(tmp_path / "out"), peftc.apply("mam", model_dir("bert-base"), set=MAM, **options)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_seed_decides_every_new_parameter(model_dir: Load) -> None:
    options: dict[str, Any] = {"head": "sequence-classification", "num_labels": 4, "set": MAM}
    first, same, other = (peftc.apply("mam", model_dir("bert-base"), seed=seed, **options) for seed in (3, 3, 4))
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        fresh = name.endswith((".W_down", ".P_k", ".P_v", "classifier.weight"))
        assert torch.equal(value, other.state_dict()[name]) != fresh, name


def test_applying_leaves_the_random_state_alone(model_dir: Load) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    peftc.apply("lora", model_dir("bert"))
    assert torch.equal(torch.rand(3), wanted)


def test_merged_config_is_the_bases(model_dir: Load, tmp_path: Path) -> None:
    driver.apply("lora", model_dir("llama"), tmp_path / "out")
    driver.merge(tmp_path / "out", tmp_path / "merged", allow_unchanged=True)
    for name in ("config.json", "generation_config.json"):
        wanted, found = (json.loads((place / name).read_text()) for place in (model_dir("llama"), tmp_path / "merged"))
        assert found == wanted


def test_state_dict_survives_torch_save(trained: Any, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    trained.save_pretrained(tmp_path / "out", state_dict={k: torch.zeros_like(v) for k, v in state.items()})
    model = peftc.load(tmp_path / "out")
    assert not torch.equal(logits(model), logits(trained))
    assert not any(model.load_state_dict(state, strict=True))
    assert torch.equal(logits(model), logits(trained))


def test_pickling_is_refused_with_what_to_do(trained: Any) -> None:
    with pytest.raises(PeftcError, match=r"E041 .*cannot be pickled"):
        pickle.dumps(trained)
