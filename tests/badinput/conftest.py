"""A tiny BERT and a delta of it, to be spoiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftc import driver


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's directory; copy it to change it."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    directory = tmp_path_factory.mktemp("tiny") / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=99, max_position_embeddings=64, num_labels=3, **sizes)
        BertForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta directory of `tiny`; copy it to change it."""
    directory = tmp_path_factory.mktemp("lora") / "delta"
    driver.apply("lora", tiny, directory)
    return directory


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def delta(lora: Path, tmp_path: Path) -> Path:
    """A copy of the delta directory that a test may spoil; it names `tiny` as its base."""
    return Path(shutil.copytree(lora, tmp_path / "delta"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory: what is in it after a refused command was left behind."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def rule(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the one delta row (or the lines) given, as the fifth line of a rule file."""

    def write(row: str, hyper: str = "{r: 4}") -> Path:
        file = tmp_path / "mine.yaml"
        file.write_text(f"peftc: 1\nname: mine\nhyper: {hyper}\ndeltas:\n  {row}\n")
        return file

    return write
