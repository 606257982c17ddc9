"""The points at which a method may change a transformer, and the functions that several methods share.

`bert` and `bart` call a `Method` at each point with the sub-layer's `Place` and the base model's value there; the
`Method` of this module changes nothing. Values are [B, S, d], queries, keys and values [B, heads, S, head_dim].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A sub-layer: the module that owns it, its stack (encoder, decoder), and for an attention self or cross."""

    path: str
    stack: str
    kind: str = ""


class Method:
    """The base model as it is. `delta` holds the method's own tensors by their state names."""

    def __init__(self, delta: State, hyper: Mapping[str, int | float | bool | str]) -> None:
        self.delta = delta
        self.hyper = hyper

    def get(self, place: Place, name: str) -> Tensor:
        return self.delta[f"{place.path}.peftc.{name}"]

    def weights(self, state: State) -> State:
        return state

    def embeddings(self, words: Tensor) -> Tensor:
        return words

    def query(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h

    def value(self, place: Place, ctx: Tensor, h: Tensor) -> Tensor:
        return h

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, mask)

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h

    def ffn_up(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h

    def block_out(self, place: Place, h: Tensor) -> Tensor:
        return h

    def adapter(self, place: Place, row: str, x: Tensor) -> Tensor:
        """f(x W_down + b_down) W_up + b_up, the biases by the hyperparameter `bias`."""
        z = x @ self.get(place, f"{row}.W_down").T
        if self.hyper["bias"]:
            z = z + self.get(place, f"{row}.b_down")
        y = activation(str(self.hyper["f"]), z) @ self.get(place, f"{row}.W_up").T
        return y + self.get(place, f"{row}.b_up") if self.hyper["bias"] else y

    def low_rank(self, place: Place, row: str, x: Tensor) -> Tensor:
        """x Aᵀ Bᵀ."""
        return x @ self.get(place, f"{row}.A").T @ self.get(place, f"{row}.B").T


def activation(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert name == "tanh", name
    return torch.tanh(x)


def linear(x: Tensor, state: State, path: str) -> Tensor:
    return x @ state[f"{path}.weight"].T + state[f"{path}.bias"]


def layer_norm(x: Tensor, state: State, path: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{path}.weight"], state[f"{path}.bias"], eps)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, S, d] to [B, heads, S, d / heads]."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, heads, S, head_dim] to [B, S, heads * head_dim]."""
    return x.transpose(1, 2).flatten(2)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention; `mask` is true where a query may look, [B or 1, 1, S or 1, T]."""
    return scores(q, k).masked_fill(~mask, -math.inf).softmax(-1) @ v


def rows(prefix: Tensor) -> Tensor:
    """The [l, heads, head_dim] rows of a prefix as [1, heads, l, head_dim] keys or values."""
    return prefix.transpose(0, 1).unsqueeze(0)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, P_k: Tensor, P_v: Tensor) -> Tensor:
    """Attention to the prefix and the keys together; every query sees the prefix. P_k, P_v: [B or 1, heads, l, e]."""
    batch, length = q.shape[0], P_k.shape[2]
    k = torch.cat([P_k.expand(batch, -1, -1, -1), k], 2)
    v = torch.cat([P_v.expand(batch, -1, -1, -1), v], 2)
    seen = torch.ones(*mask.shape[:3], length, dtype=torch.bool)
    return attention(q, k, v, torch.cat([seen, mask], 3))


def mean_gate(x: Tensor, W_g: Tensor) -> Tensor:
    """UniPELT's gate, one number an example: the mean over the sequence of sigmoid(x W_g), [B, 1, 1]."""
    return torch.sigmoid(x @ W_g.T).mean(1, keepdim=True)
