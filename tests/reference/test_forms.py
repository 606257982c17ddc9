"""The design space beyond the named methods: each choice of the rule language against its formula.

Forms (LayerNorm, weight tying, expressions), modified representations, insertions, compositions, and `where`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import peftc
from reference.case import Case
from reference.compare import Hyper, assert_equal
from reference.method import Method, Place, State, attention, merge, split

HYPER: Hyper = {"r": 5, "f": "tanh", "bias": True}


class NormIn(Method):
    """h + f(LN(x) W_down) W_up."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        weight, bias = self.get(place, "a.ln_w"), self.get(place, "a.ln_b")
        return h + self.adapter(place, "a", F.layer_norm(x, x.shape[-1:], weight, bias))


class NormOut(Method):
    """h + LN(f(x W_down) W_up)."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        weight, bias = self.get(place, "a.ln_w"), self.get(place, "a.ln_b")
        return h + F.layer_norm(self.adapter(place, "a", x), h.shape[-1:], weight, bias)


class FfnParallel(Method):
    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "a", x)


class PerChannel(Method):
    """A trained scale a channel."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.get(place, "a.s") * self.adapter(place, "a", x)


class SigmoidGate(Method):
    """A gate a token, from the input."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + torch.sigmoid(x @ self.get(place, "a.W_g").T) * self.adapter(place, "a", x)


class TiedDown(Method):
    """W_down tied to the frozen W_q: relu(x W_q) W_up added to the attention's output."""

    def query(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        self.projected = h
        return h

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + torch.relu(self.projected) @ self.get(place, "a.W_up").T


class Concat(Method):
    """A sequential adapter on the merged heads, before W_o."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        h = merge(attention(q, k, v, mask))
        return split(h + self.adapter(place, "a", h), q.shape[1])


class Weights(Method):
    """W + B A for the projections of every attention."""

    projections = re.compile(r"\.(query|key|value)$|attention\.output\.dense$|_attn\.(q|k|v|out)_proj$")

    def weights(self, state: State) -> State:
        moved = dict(state)
        for name, weight in state.items():
            owner = name.removesuffix(".weight")
            if name != owner and self.projections.search(owner):
                moved[name] = weight + self.delta[f"{owner}.peftc.a.B"] @ self.delta[f"{owner}.peftc.a.A"]
        return moved


class LinearAdapter(Method):
    """An adapter parallel to one linear layer, W_2 of the FFN."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        (owner,) = {key.split(".peftc.")[0] for key in self.delta if key.startswith(f"{place.path}.")}
        return h + self.adapter(Place(owner, place.stack), "a", mid)


class SelfFirst(Method):
    """A parallel adapter at the self attention of the first layer of each stack."""

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        chosen = place.kind == "self" and ".0." in f"{place.path}."
        return h + self.adapter(place, "a", x) if chosen else h


class OneForAll(Method):
    """LoRA at every FFN with A and B shared by the whole model."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + x @ self.delta["peftc.a.A"].T @ self.delta["peftc.a.B"].T


ROWS: dict[str, tuple[str, type[Method]]] = {
    "layer-norm-in": ("{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {norm: in}}", NormIn),
    "layer-norm-out": ("{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {norm: out}}", NormOut),
    "dropout": ("{at: ffn, modify: out, insert: parallel, form: bottleneck, with: {p: 0.5}}", FfnParallel),
    "init-of-bert": ("{at: ffn, modify: out, insert: parallel, form: bottleneck_bert}", FfnParallel),
    "scale-per-channel": (
        "{at: ffn, modify: out, insert: parallel, form: bottleneck,"
        " params: {s: {shape: [d_out], init: ones}}, compose: h + s * dh}",
        PerChannel,
    ),
    "sigmoid-gate": (
        "{at: ffn, modify: out, insert: parallel, form: bottleneck,"
        " params: {W_g: {shape: [1, d_in], init: zeros}}, compose: 'h + sigmoid(linear(x, W_g)) * dh'}",
        SigmoidGate,
    ),
    "down-tied-to-the-query": (
        "{at: attention, modify: out, insert: q,"
        " form: {expr: 'linear(relu(x), W_up)', params: {W_up: {shape: [d_out, d_in], init: zeros}}}}",
        TiedDown,
    ),
    "concatenated-heads": ("{at: attention, modify: concat, insert: sequential, form: bottleneck}", Concat),
    "projection-outputs": (
        "{at: linear, where: {role: [q, k, v, o]}, modify: out, insert: parallel, form: low_rank}",
        Weights,
    ),
    "projection-weights": (
        "{at: linear, where: {role: [q, k, v, o]}, modify: weight, insert: sequential, form: {expr: B @ A, params:"
        " {A: {shape: [r, d_in], init: kaiming_uniform}, B: {shape: [d_out, r], init: zeros}}}}",
        Weights,
    ),
    "adapter-at-a-linear": (
        "{at: linear, where: {role: down}, modify: out, insert: parallel, form: bottleneck}",
        LinearAdapter,
    ),
    "first-layer-self": (
        "{at: attention, where: {kind: self, layers: first 1}, modify: out, insert: parallel, form: bottleneck}",
        SelfFirst,
    ),
    "shared-by-the-model": (
        "{at: ffn, modify: out, insert: parallel, form: {expr: 'linear(linear(x, A), B)', params:"
        " {A: {shape: [r, d_in], init: kaiming_uniform, share: model},"
        " B: {shape: [d_out, r], init: zeros, share: model}}}}",
        OneForAll,
    ),
}


QUICK = ("first-layer-self", "projection-weights")
"""Choices that `make test` makes on BART too, which takes three times as long as BERT."""
ON_BOTH = [
    pytest.param(choice, model, marks=() if model == "bert" or choice in QUICK else pytest.mark.slow)
    for model in ("bert", "bart")
    for choice in ROWS
]


@pytest.mark.parametrize(("choice", "case"), ON_BOTH, indirect=["case"])
def test_choice_equals_its_formula(choice: str, case: Case, tmp_path: Path) -> None:
    row, method = ROWS[choice]
    rule = tmp_path / "rule.yaml"
    rule.write_text(f"peftc: 1\nname: rule\nhyper: {{r: 5, f: tanh, bias: true}}\ndeltas:\n  a: {row}\n")
    assert_equal(peftc.apply(str(rule), case.directory, seed=0), case, method, HYPER)
