"""Several states on one base answer, train and are saved as models that hold only one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.diagnostics import PeftcError
from peftc.ir.program import Program
from runtime.tiny import batch, moved

Load = Callable[..., Any]
HEAD: dict[str, Any] = {"head": "sequence-classification", "num_labels": 3}


@pytest.fixture(scope="module")
def saved(model_dir: Load, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained delta directories of a BERT: two of one rule, and one of a rule that trains biases of the base too."""
    root = tmp_path_factory.mktemp("states")
    for seed, (name, rule) in enumerate({"en": "lora", "de": "lora", "bits": "bitfit"}.items()):
        moved(peftc.apply(rule, model_dir("bert-base"), seed=seed, **HEAD)).save_pretrained(root / name)
    return {name: root / name for name in ("en", "de", "bits")}


@pytest.fixture
def held(saved: dict[str, Path]) -> Any:
    model: Any = peftc.load(saved["en"])
    model.add("de", saved["de"])
    model.add("bits", saved["bits"])
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch()).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_state_answers_and_trains_as_a_model_of_its_own(held: Any, saved: dict[str, Path]) -> None:
    for name in ("de", "bits", "default", "de"):
        alone = peftc.load(saved["en" if name == "default" else name])
        held.set_active(name)
        assert held.active == name
        assert torch.equal(logits(held), logits(alone))
        ours, theirs = gradients(held), gradients(alone)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_switching_traces_nothing_and_states_of_one_rule_share_programs(
    held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*args: object) -> Program:
        raise AssertionError("traced")

    logits(held)
    monkeypatch.setattr("peftc.frontend.trace.trace", trace)
    monkeypatch.setattr("peftc.runtime.graph_model.analyse", trace)
    first = held.surgery.programs
    held.set_active("de")
    logits(held)
    assert held.surgery.programs is first


def test_disabled_model_is_the_base_bit_for_bit(held: Any, model_dir: Load) -> None:
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BertForSequenceClassification.from_pretrained(model_dir("bert-base"), num_labels=3).eval()
    held.set_active("bits")
    before = logits(held)
    with held.disable():
        assert held.active is None
        assert torch.equal(logits(held), logits(base))
    assert torch.equal(logits(held), before)


def test_disabled_model_generates_as_its_base(model_dir: Load, plain: Load) -> None:
    model: Any = moved(peftc.apply("lora", model_dir("llama")))
    with model.disable():
        ours = model.generate(**batch(2), max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, plain("llama").generate(**batch(2), max_new_tokens=4, do_sample=False))


def test_a_state_is_saved_as_from_a_model_of_its_own(held: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    held.save_pretrained(tmp_path / "one" / "de", state="de")
    peftc.load(saved["de"]).save_pretrained(tmp_path / "two" / "de")
    for file in (tmp_path / "two" / "de").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / "de" / file.name).read_bytes()
    assert held.active == "default"


def test_a_state_can_be_removed_and_others_stay(held: Any) -> None:
    before = logits(held)
    held.remove("bits")
    held.remove("de")
    assert held.states == ("default",)
    assert not [name for name in held.state_dict() if "peftc_de" in name or "bits" in name]
    assert torch.equal(logits(held), before)


@pytest.mark.parametrize(
    ("name", "reason"), [("de", "has a state `de` already"), ("base", "kept under"), ("a.b", "names modules")]
)
def test_names_that_cannot_be_are_refused(held: Any, saved: dict[str, Path], name: str, reason: str) -> None:
    with pytest.raises(PeftcError, match=f"E047 .*{reason}"):
        held.add(name, saved["de"])


def test_states_that_are_not_there_or_in_use_are_refused(held: Any) -> None:
    with pytest.raises(PeftcError, match=r"E047 .*no state `dee`"):
        held.set_active("dee")
    with pytest.raises(PeftcError, match=r"E047 .*is the active state"):
        held.remove("default")
    with held.disable(), pytest.raises(PeftcError, match=r"E047 .*inside disable"):
        held.set_active("de")


def test_deltas_of_another_base_or_head_are_refused(held: Any, model_dir: Load, tmp_path: Path) -> None:
    peftc.apply("lora", model_dir("bert")).save_pretrained(tmp_path / "bert")
    with pytest.raises(PeftcError, match="E035"):
        held.add("other", tmp_path / "bert")
    other = {**HEAD, "num_labels": 5}
    peftc.apply("lora", model_dir("bert-base"), **other).save_pretrained(tmp_path / "five")
    with pytest.raises(PeftcError, match=r"E047 .*with 5 labels"):
        held.add("five", tmp_path / "five")


def test_a_copy_switches_for_itself(held: Any, saved: dict[str, Path]) -> None:
    copied = copy.deepcopy(held)
    copied.set_active("de")
    assert held.active == "default"
    assert torch.equal(logits(copied), logits(peftc.load(saved["de"])))
    assert torch.equal(logits(held), logits(peftc.load(saved["en"])))
