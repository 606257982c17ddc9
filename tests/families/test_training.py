"""An adapted model starts as its base, bit for bit, in evaluation and in training; every delta learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from families.conftest import Subject
from families.family import fill


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def test_a_delta_that_is_zero_at_the_start_changes_no_bit(subject: Subject) -> None:
    """In evaluation, and in training under one seed, where every dropout must draw as it does in the base.

    Bit for bit needs the base to run the same kernels on the same strides. So it runs without a cache, which copies
    keys and values, and on a padded batch: without padding transformers drops the mask and lets the kernel be
    causal, which the graph, made for any mask, does not.
    """
    adapted, plain, inputs = subject.apply("lora", r=4), subject.family.build(), subject.family.inputs()
    for module in plain.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    with torch.no_grad():
        assert torch.equal(logits(adapted, inputs), logits(plain, inputs))
        torch.manual_seed(3)
        expected = logits(plain.train(), inputs)
        torch.manual_seed(3)
        found = logits(adapted.train(), inputs)
    assert torch.equal(found, expected)


def test_dropout_is_on_in_training(subject: Subject) -> None:
    """Guards the test above; a family without dropout by default (Llama, say) is deterministic."""
    config = subject.model.config.to_dict()
    rates = [value for name, value in config.items() if "drop" in name and isinstance(value, float)]
    plain, inputs = subject.family.build().train(), subject.family.inputs()
    with torch.no_grad():
        assert torch.equal(logits(plain, inputs), logits(plain, inputs)) != any(rates)


def test_every_delta_parameter_of_mam_gets_a_gradient(subject: Subject, mam: Any) -> None:
    deltas = fill(mam)
    names = {name.split(".peftc.")[1].split(".")[0] for name in deltas}
    assert names == {"prefix", "adapter"}
    output = logits(mam.eval(), subject.family.inputs())
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad((output * noise).sum(), list(deltas.values()))
    for name, gradient in zip(deltas, gradients, strict=True):
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


def test_mam_changes_the_output_of_every_example(subject: Subject, mam: Any) -> None:
    fill(mam)
    inputs = subject.family.inputs()
    with torch.no_grad():
        difference = logits(mam.eval(), inputs) - logits(subject.model, inputs)
    assert (difference.flatten(1).abs().amax(1) > 1e-3).all()


def test_mam_puts_deltas_under_every_sub_layer(subject: Subject, mam: Any) -> None:
    family = subject.family
    owners = {name: set() for name in ("prefix", "adapter")}
    for name, _ in mam.named_parameters():
        owner, found, rest = name.partition(".peftc.")
        if found:
            owners[rest.split(".")[0]].add(owner)
    assert owners == {
        "prefix": set(family.attention_modules(subject.model)),
        "adapter": set(family.ffn_modules(subject.model)),
    }
