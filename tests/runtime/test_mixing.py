"""Inside `mix` the model adds up what its states make of each value, as a hand-written sum and as PEFT's `cat` do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.diagnostics import PeftcError
from runtime.tiny import batch, moved

Load = Callable[..., Any]
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "de": ("lora", {"r": 3, "alpha": 6}),
    "fr": ("lora", {"r": 5, "alpha": 5}),
    "mam": ("mam", {"l": 3, "r": 4}),
    "dora": ("dora", {"r": 3}),
    "prompt": ("prompt", {"l": 2}),
}
WEIGHTS = {"de": 0.7, "fr": -0.4}


@pytest.fixture(scope="module")
def saved(model_dir: Load, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained delta directories of a Llama in float64, each by another rule."""
    root = tmp_path_factory.mktemp("mixed")
    for seed, (name, (rule, given)) in enumerate(RULES.items()):
        moved(peftc.apply(rule, model_dir("llama"), given, seed=seed, dtype=torch.float64)).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def held(saved: dict[str, Path]) -> Any:
    """A model with all states; "default" is "de" once more."""
    model: Any = peftc.load(saved["de"], dtype=torch.float64)
    for name in ("de", "fr", "mam", "dora", "prompt"):
        model.add(name, saved[name])
    return model


@pytest.fixture
def base(model_dir: Load) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float64).eval()


def own(model: Any, state: str) -> dict[str, torch.Tensor]:
    """The delta tensors of a state, by the names that they have when it is active."""
    found = model._states.get(state)
    names = found.surgery.plan.parameters
    return dict(zip(names, model._states.parameters(found), strict=True))


def low_rank(model: Any, state: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A state's LoRA by hand: (module of a projection, its input) -> alpha / r * B A x."""
    given = RULES[state][1]
    factors = own(model, state)

    def delta(path: str, x: torch.Tensor) -> torch.Tensor:
        site, role = path.rsplit(".", 1)
        start = f"{site}.peftc.lora.{role[0]}."
        return given["alpha"] / given["r"] * (x @ factors[start + "A"].T) @ factors[start + "B"].T

    return delta


@pytest.fixture
def by_hand(base: Any, held: Any) -> Iterator[Any]:
    """The base with 0.7 of one LoRA and -0.4 of another added to queries and values by hooks."""
    deltas = {name: low_rank(held, name) for name in WEIGHTS}

    def add(path: str, _: Any, given: tuple[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
        return result + sum(WEIGHTS[name] * deltas[name](path, given[0]) for name in WEIGHTS)

    hooks = [
        module.register_forward_hook(functools.partial(add, path))
        for path, module in base.named_modules()
        if path.endswith(("q_proj", "v_proj"))
    ]
    assert len(hooks) == 4
    yield base
    for hook in hooks:
        hook.remove()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def test_a_mixture_of_loras_is_the_weighted_sum_of_their_products(held: Any, by_hand: Any) -> None:
    with held.mix(WEIGHTS):
        ours = logits(held)
    torch.testing.assert_close(ours, logits(by_hand), rtol=1e-12, atol=1e-12)
    assert held.active == "default"


def test_each_state_of_a_mixture_gets_its_part_of_the_gradient(held: Any, by_hand: Any) -> None:
    mine = [p for name in WEIGHTS for p in own(held, name).values()]
    with held.mix(WEIGHTS):
        held.zero_grad()
        held(**batch()).logits.square().sum().backward()
        ours = [p.grad.clone() for p in mine]
        theirs = torch.autograd.grad(by_hand(**batch()).logits.square().sum(), mine)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for p in mine)


def test_a_mixture_generates_what_the_sum_generates(held: Any, by_hand: Any) -> None:
    inputs = {name: tensor.flip(1) for name, tensor in batch(3, 6).items()}
    with held.mix(WEIGHTS):
        ours = held.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, by_hand.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True))


def test_a_mixture_of_loras_is_pefts_cat(held: Any, base: Any) -> None:
    from peft import LoraConfig, get_peft_model

    def config(state: str) -> LoraConfig:
        given = RULES[state][1]
        return LoraConfig(r=given["r"], lora_alpha=given["alpha"], target_modules=["q_proj", "v_proj"])

    weights = {"de": 0.7, "fr": 0.4}  # PEFT takes no negative weight here
    theirs: Any = get_peft_model(base, config("de"), adapter_name="de").double()
    theirs.add_adapter("fr", config("fr"))
    for name in weights:
        for key, value in own(held, name).items():
            site, _, rest = key.partition(".peftc.lora.")
            module = theirs.base_model.model.get_submodule(f"{site}.{rest[0]}_proj")
            factor = module.lora_A if rest[-1] == "A" else module.lora_B
            factor[name].to(torch.float64).weight.data.copy_(value)
    theirs.add_weighted_adapter(list(weights), list(weights.values()), "both", combination_type="cat")
    theirs.set_adapter("both")
    with held.mix(weights):
        torch.testing.assert_close(logits(held), logits(theirs.double().eval()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mam", "dora", "fr"])
def test_a_state_of_weight_1_is_that_state_and_of_weight_0_the_base(held: Any, base: Any, name: str) -> None:
    with held.mix({name: 1.0, "de": 0}):
        ours = logits(held)
    held.set_active(name)
    torch.testing.assert_close(ours, logits(held), rtol=1e-9, atol=1e-10)
    held.set_active("default")
    with held.mix({name: 0.0}):
        torch.testing.assert_close(logits(held), logits(base), rtol=1e-12, atol=1e-12)


def test_rules_of_every_kind_mix_in_one_graph(held: Any) -> None:
    """Prefixes, adapters, changed weights and low-rank products: near weight 0 a mixture is the sum of its parts."""
    step, names = 1e-4, ("mam", "dora", "fr")
    parts = []
    for name in names:
        with held.mix({other: step * (other == name) for other in names}):
            parts.append(logits(held))
    with held.mix(dict.fromkeys(names, 0)):
        start = logits(held)
    with held.mix(dict.fromkeys(names, step)):
        both = logits(held)
    changes = [part - start for part in parts]
    assert all(change.abs().max() > 3e-4 for change in changes)
    torch.testing.assert_close(both - start, sum(changes), rtol=0, atol=3e-6)  # Llama's norms round to float32


def test_other_weights_and_another_active_state_trace_nothing(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with held.mix(WEIGHTS):
        first = logits(held)

    def trace(*args: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("peftc.runtime.graph_model.analyse", trace)
    held.set_active("de")
    with held.mix(WEIGHTS):
        assert torch.equal(logits(held), first)
    held.set_active("default")
    with held.mix({"fr": 0.1, "de": 2}):
        assert not torch.equal(logits(held), first)


def test_trained_base_tensors_are_mixed_too(model_dir: Load, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head": "sequence-classification", "num_labels": 3, "dtype": torch.float64}
    models: list[Any] = [moved(peftc.apply("bitfit", model_dir("bert-base"), **options))]
    models.append(peftc.apply("bitfit", model_dir("bert-base"), **options))
    trained = models[0].surgery.plan.trained
    with torch.no_grad():
        for name in trained:
            models[1].get_parameter(name).sub_(0.1 * torch.randn(models[1].get_parameter(name).shape))
    for model, name in zip(models, ("one", "two"), strict=True):
        model.save_pretrained(tmp_path / name)
    start: Any = peftc.apply("bitfit", model_dir("bert-base"), **options)
    with torch.no_grad():
        for name in (*start.surgery.plan.parameters, *trained):
            tensor = start.get_parameter(name)
            changes = [model.get_parameter(name) - tensor for model in models]
            tensor.add_(0.7 * changes[0] + 0.6 * changes[1])
    held: Any = peftc.load(tmp_path / "one", dtype=torch.float64)
    held.add("two", tmp_path / "two")
    with held.mix({"default": 0.7, "two": 0.6}):
        torch.testing.assert_close(logits(held), logits(start), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_mixed_is_refused(held: Any, tmp_path: Path) -> None:
    with held.mix({"de": 0.5, "prompt": 0.5}), pytest.raises(PeftcError, match=r"E048 .*`prompt`.*sequence longer"):
        logits(held)
    for weights, reason in (({}, "a weight for each"), ({"de": float("nan")}, "finite"), ({"dee": 1}, "E047")):
        with pytest.raises(PeftcError, match=reason), held.mix(weights):
            pass
    with held.mix(WEIGHTS):
        with pytest.raises(PeftcError, match=r"E048 .*no set of deltas"):
            held.save_pretrained(tmp_path / "mixed")
        with pytest.raises(PeftcError, match=r"E047 .*inside mix\(\)"):
            held.set_active("fr")
        with pytest.raises(PeftcError, match=r"E048 .*not called by itself"):
            held.model(**batch())
    with held.disable(), pytest.raises(PeftcError, match=r"E047 .*inside disable\(\)"), held.mix(WEIGHTS):
        pass


def test_a_mixture_runs_module_by_module_with_the_same_numbers(held: Any) -> None:
    """Where layers are computed again, or have hooks, the graph runs in parts, and the mixing with them."""
    model, weights = copy.deepcopy(held), {"mam": 0.3, "dora": 0.5, "fr": -0.4}
    found = []
    for again in (False, True):
        if again:
            model.train()  # no dropout in a Llama
            model.activation_checkpointing_enable()
        model.zero_grad()
        with model.mix(weights):
            model(**batch()).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == sum(len(own(held, name)) for name in weights)
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)
