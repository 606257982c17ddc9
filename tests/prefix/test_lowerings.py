"""Prefix tuning as longer keys and values equals the gated sum (He et al. 2022, section 3.1), under every mask.

Everything runs in float64. A family's attention is spelled in one of two ways, one fused op or scores, softmax and
product, and its mask comes in one of four: none, padding, causal by mask, causal by flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.family import BY_NAME, Family, fill, softmax_keeps_float64
from torch import Tensor

import peftc

EXACT = 1e-12
QUICK = ("bert", "gpt2", "llama", "bloom", "bart")
"""One family for each kind of mask and of positions; `make test-all` runs the others too."""


def names(*families: str, quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in families]


NAMES = names("bert", "gpt2", "llama", "bloom", "t5", "bart", "gemma2", "mpnet")
OTHERS = names("opt", "qwen3", "phi3")
DECODERS = names("gpt2", "opt", "bloom", "llama", "qwen3", "phi3", "gemma2", "bart", "t5")
EAGER = names("bert", "llama", "gpt2", "bart", quick=("llama", "bart"))


@pytest.fixture(scope="module", autouse=True)
def softmax_in_float64() -> Iterator[None]:
    with softmax_keeps_float64():
        yield


class Models:
    """Families in float64, plain and with a prefix of three rows, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: dict[tuple[str, str], Any] = {}

    def plain(self, name: str, attention: str = "") -> Any:
        key = (name, "plain", attention)
        if key not in self.made:
            overrides = {"attn_implementation": attention} if attention else {}
            self.made[key] = BY_NAME[name].build(**overrides).double()
            self.made[key].save_pretrained(self._path(name, attention))
        return self.made[key]

    def __call__(self, rule: str, name: str, attention: str = "") -> Any:
        key = (name, rule, attention)
        if key not in self.made:
            self.plain(name, attention)
            path = self._path(name, attention)
            if attention:
                config = (path / "config.json").read_text().rstrip().rstrip("}").rstrip()
                (path / "config.json").write_text(f'{config},\n  "attn_implementation": "{attention}"\n}}\n')
            model = peftc.apply(rule, path, set={"l": 3}, seed=0, dtype=torch.float64)
            fill(model)
            self.made[key] = model
        return self.made[key]

    def _path(self, name: str, attention: str) -> Path:
        return self.directory / f"{name}{attention}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("prefix"))


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def real(family: Family, inputs: dict[str, Tensor], output: Tensor) -> Tensor:
    """The rows of an output that stand for tokens, not for padding."""
    mask = inputs.get("attention_mask")
    return output[mask.bool()] if mask is not None and family.decoder else output


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
@pytest.mark.parametrize("name", NAMES)
def test_concat_equals_gated(models: Models, name: str, padded: bool) -> None:
    family = BY_NAME[name]
    inputs = family.inputs(padded=padded)
    concat, gated = logits(models("prefix", name), inputs), logits(models("prefix_gated", name), inputs)
    assert concat.dtype == torch.float64
    assert (real(family, inputs, concat - gated)).abs().max() <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_both_lowerings_agree(models: Models, name: str) -> None:
    inputs, found = BY_NAME[name].inputs(), {}
    for rule in ("prefix", "prefix_gated"):
        model = models(rule, name)
        deltas = [n for n, p in model.named_parameters() if p.requires_grad and ".peftc." in n]
        output = real(BY_NAME[name], inputs, model(**inputs).logits)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        parameters = [model.get_parameter(n) for n in deltas]
        found[rule] = dict(zip(deltas, torch.autograd.grad((output * noise).sum(), parameters), strict=True))
    assert found["prefix"].keys() == found["prefix_gated"].keys()
    for key, value in found["prefix"].items():
        assert (value - found["prefix_gated"][key]).abs().max() <= 1e-10 * max(1.0, float(value.abs().max())), key


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_padding_changes_nothing(models: Models, name: str) -> None:
    """Each row of a padded batch gives what it gives alone."""
    family, model = BY_NAME[name], models("prefix", name)
    inputs = family.inputs()
    batch = logits(model, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        for key in ("input_ids", "attention_mask"):
            one[key] = one[key][:, :length]
        alone = logits(model, one)[0]
        assert (batch[row][: len(alone)] - alone).abs().max() <= 1e-12, (row, length)


@pytest.mark.parametrize("name", DECODERS)
def test_an_all_ones_mask_is_no_mask(models: Models, name: str) -> None:
    inputs = BY_NAME[name].inputs(padded=False)
    masked = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    model = models("prefix", name)
    assert (logits(model, inputs) - logits(model, masked)).abs().max() <= EXACT


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_the_prefix_has_an_effect_on_every_token(models: Models, name: str, padded: bool) -> None:
    family = BY_NAME[name]
    inputs = family.inputs(padded=padded)
    change = real(family, inputs, logits(models("prefix", name), inputs) - logits(models.plain(name), inputs))
    assert (change.abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_token_sees_a_later_one(models: Models, name: str, padded: bool) -> None:
    family, model = BY_NAME[name], models("prefix", name)
    inputs = family.inputs(padded=padded)
    ids = "decoder_input_ids" if family.seq2seq else "input_ids"
    changed = {**inputs, ids: inputs[ids].clone()}
    changed[ids][:, 2] = (changed[ids][:, 2] + 7) % 90 + 3
    before, after = logits(model, inputs), logits(model, changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert ((before - after)[:, 2].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
@pytest.mark.parametrize("name", EAGER)
def test_the_spelled_out_attention_equals_the_fused_one(models: Models, name: str, padded: bool) -> None:
    family = BY_NAME[name]
    inputs = family.inputs(padded=padded)
    fused, eager = models("prefix", name), models("prefix", name, "eager")
    assert regions(fused) == {"FusedRegion"} and regions(eager) == {"EagerRegion"}
    assert (real(family, inputs, logits(fused, inputs) - logits(eager, inputs))).abs().max() <= EXACT


def regions(model: Any) -> set[str]:
    programs = model.surgery.programs.values()
    return {type(site.region).__name__ for program in programs for site in program.sites if site.kind == "attention"}
