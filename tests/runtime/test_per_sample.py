"""Each row of a batch inside `per_sample` is what a model that holds its state alone makes of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.diagnostics import PeftcError
from runtime.tiny import batch, moved, seq2seq_batch

Load = Callable[..., Any]
HEAD: dict[str, Any] = {"head": "sequence-classification", "num_labels": 3}
RULES: dict[str, tuple[str, dict[str, Any]]] = {"de": ("lora", {}), "fr": ("prompt", {"l": 4}), "bits": ("bitfit", {})}
STATE = {"default": "de", "fr": "fr", "bits": "bits"}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {"de": ("lora", {}), "fr": ("prefix", {"l": 4})}


@pytest.fixture(scope="module")
def saved(model_dir: Load, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained delta directories of a BERT, each by another rule and with a head of its own, and of a Llama."""
    root = tmp_path_factory.mktemp("states")
    for seed, (name, (rule, given)) in enumerate(RULES.items()):
        model = peftc.apply(rule, model_dir("bert-base"), given, seed=seed, dtype=torch.float64, **HEAD)
        moved(model).save_pretrained(root / name)
    for name, (rule, given) in TEXTS.items():
        moved(peftc.apply(rule, model_dir("llama"), given)).save_pretrained(root / f"llama-{name}")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def only(saved: dict[str, Path]) -> Load:
    """The model of one delta directory, as a program that knows of no other state has it."""

    @functools.cache
    def load(name: str) -> Any:
        return peftc.load(saved[name], dtype=None if "-" in name else torch.float64)

    return load


@pytest.fixture(scope="module")
def held(saved: dict[str, Path]) -> Any:
    model: Any = peftc.load(saved["de"], dtype=torch.float64)
    for name in ("fr", "bits"):
        model.add(name, saved[name])
    return model


@pytest.fixture(scope="module")
def texts(saved: dict[str, Path]) -> Any:
    model: Any = peftc.load(saved["llama-de"])
    model.add("fr", saved["llama-fr"])
    return model


def rows_of(inputs: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in inputs.items()}


def base_of(model_dir: Load) -> Any:
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls, given = BertForSequenceClassification, {"num_labels": 3, "dtype": torch.float64}
        return cls.from_pretrained(model_dir("bert-base"), **given).eval()


def test_each_row_is_answered_as_by_its_state_alone(held: Any, only: Load, model_dir: Load) -> None:
    states = ["bits", "default", None, "fr", "default", "bits"]
    inputs = batch(len(states))
    with torch.no_grad(), held.per_sample(states):
        found = held(**inputs, output_hidden_states=False)
        as_tuple = held(**inputs, return_dict=False)[0]
    for row, name in enumerate(states):
        alone = base_of(model_dir) if name is None else only(STATE[name])
        with torch.no_grad():
            expected = alone(**rows_of(inputs, [row])).logits
        torch.testing.assert_close(found.logits[row : row + 1], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(as_tuple, found.logits)
    assert held.active == "default"


def test_each_state_gets_the_gradient_of_its_own_rows(held: Any, only: Load) -> None:
    states = ["fr", "bits", "default", None, "fr"]
    inputs = batch(len(states))
    held.zero_grad()
    with held.per_sample(states):
        trained = {id(p) for p in held.parameters() if p.requires_grad}
        held(**inputs).logits.square().sum().backward()
    mine = held._states
    for name in ("default", "fr", "bits"):
        own = only(STATE[name])
        own.zero_grad()
        own(**rows_of(inputs, [at for at, row in enumerate(states) if row == name])).logits.square().sum().backward()
        ours = [p for p in mine.parameters(mine.get(name)) if p.grad is not None]
        theirs = [own.get_parameter(n).grad for n in mine.get(name).surgery.plan.parameters]
        theirs += [own.get_parameter(n).grad for n in mine.slots if n in mine.get(name).trained]
        theirs = [grad for grad in theirs if grad is not None]
        assert len(ours) == len(theirs) > 0
        assert all(id(parameter) in trained for parameter in ours)
        for parameter, grad in zip(ours, theirs, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)
    left = {name for name, p in held.named_parameters() if p.requires_grad}
    assert left == {*mine.active.surgery.plan.trainable}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}])
def test_each_row_is_generated_as_by_its_state_alone(
    texts: Any, only: Load, plain: Load, options: dict[str, Any]
) -> None:
    states = ["fr", None, "default", "fr"]
    inputs = {name: tensor.flip(1) for name, tensor in batch(len(states), 6).items()}  # padded at the left
    with texts.per_sample(states):
        found = texts.generate(**inputs, max_new_tokens=5, **options)
    several = options.get("num_return_sequences", 1)
    assert found.shape[0] == len(states) * several
    for row, name in enumerate(states):
        alone = plain("llama") if name is None else only(f"llama-{STATE[name]}")
        same = [at for at, other in enumerate(states) if other == name]
        expected = alone.generate(**rows_of(inputs, same), max_new_tokens=5, use_cache=True, **options)
        expected = expected.unflatten(0, (-1, several))[same.index(row)]
        ours = found[row * several : (row + 1) * several]
        assert torch.equal(ours[:, : expected.shape[1]], expected)
        assert (ours[:, expected.shape[1] :] == 0).all()


def test_the_model_inside_answers_row_by_row(texts: Any, only: Load) -> None:
    states, inputs = ["fr", "default", "fr"], batch(3)
    with torch.no_grad(), texts.per_sample(states):
        found = texts.model(**inputs).last_hidden_state
    for row, name in enumerate(states):
        with torch.no_grad():
            expected = only(f"llama-{STATE[name]}").model(**rows_of(inputs, [row])).last_hidden_state
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_encoder_decoders_answer_and_generate_row_by_row(model_dir: Load, tmp_path: Path) -> None:
    for name, (rule, given) in TEXTS.items():
        moved(peftc.apply(rule, model_dir("bart"), given)).save_pretrained(tmp_path / name)
    model: Any = peftc.load(tmp_path / "de")
    model.add("fr", tmp_path / "fr")
    states, inputs = ["fr", "default", "fr"], seq2seq_batch()
    with torch.no_grad(), model.per_sample(states):
        found, written = model(**inputs).logits, model.generate(**batch(3), max_new_tokens=5, num_beams=2)
    for name in ("default", "fr"):
        alone: Any = peftc.load(tmp_path / STATE[name])
        same = [at for at, other in enumerate(states) if other == name]
        with torch.no_grad():
            expected = alone(**rows_of(inputs, same)).logits
        torch.testing.assert_close(found[same], expected, rtol=1e-4, atol=1e-5)
        text = alone.generate(**rows_of(batch(3), same), max_new_tokens=5, num_beams=2)
        assert torch.equal(written[same][:, : text.shape[1]], text)
        assert (written[same][:, text.shape[1] :] == 0).all()


def test_nothing_is_traced_for_another_order_of_rows(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = texts, batch(3)

    def trace(*args: object) -> None:
        raise AssertionError("traced")

    with torch.no_grad(), model.per_sample(["default", "fr", None]):
        model(**inputs)
    monkeypatch.setattr("peftc.runtime.graph_model.analyse", trace)
    with torch.no_grad(), model.per_sample([None, "default", "fr"]):
        model(**inputs)


def test_what_no_row_has_by_itself_is_refused(texts: Any) -> None:
    model, inputs = copy.deepcopy(texts), batch(2)
    with pytest.raises(PeftcError, match=r"E047 .*no state `dee`"), model.per_sample(["dee"]):
        pass
    with pytest.raises(PeftcError, match=r"E047 .*takes a list"), model.per_sample("fr"):
        pass
    with model.per_sample(["fr", None]):
        with pytest.raises(PeftcError, match=r"E047 .*takes no `labels`"):
            model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(PeftcError, match=r"E047 .*names the states of 2 rows, and `input_ids` has 3"):
            model(**batch(3))
        with pytest.raises(PeftcError, match=r"E047 .*has no cache"):
            model(**inputs, use_cache=True)
        with pytest.raises(PeftcError, match=r"E047 .*takes no `return_dict_in_generate`"):
            model.generate(**inputs, return_dict_in_generate=True)
        with pytest.raises(PeftcError, match=r"E047 .*made active inside per_sample\(\)"):
            model.set_active("fr")
        with pytest.raises(PeftcError, match=r"E047 .*removed inside per_sample\(\)"):
            model.remove("fr")
    model.remove("fr")


def test_layers_that_are_computed_again_know_their_state(texts: Any) -> None:
    """Activations are computed again in the backward pass, when no row's state is active any more."""
    model = copy.deepcopy(texts)
    found = []
    for again in (False, True):
        if again:
            model.train()  # no dropout in a Llama
            model.activation_checkpointing_enable()
        model.zero_grad()
        with model.per_sample(["fr", "default", "fr"]):
            model(**batch(3)).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert {name.split(".peftc")[1].split(".")[0] for name in found[0]} == {"", "_fr"}
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)
