"""How many parameters each method trains, from the module tree of transformers' models and the papers' shapes alone.

Nothing of peftc's locators, planner or rules is used: layers are found by the names that transformers gives them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftc.checking.families import FAMILIES, HEADS, ROLES
from peftc.store.heads import resolve

_NAMES = {
    "q": r"query|q_proj", "k": r"key|k_proj", "v": r"value|v_proj",
    "o": r"attention\.output\.dense|o_proj|out_proj", "up": r"intermediate\.dense|up_proj|fc1", "gate": "gate_proj",
    "down": r"layer\.\d\.output\.dense|down_proj|fc2",
}  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """The linear layers of a model by role, as (d_in, d_out) each, and the parameters that are not of linear layers."""

    linears: dict[str, list[tuple[int, int]]]
    norm_weights: int
    biases: int
    all: int
    kinds: int
    """Stacks of attentions: self of the encoder, self and cross of the decoder."""

    def of(self, roles: str) -> list[tuple[int, int]]:
        return [shape for role in roles.split() for shape in self.linears[role]]

    def sum(self, roles: str, size: Callable[[int, int], int]) -> int:
        return sum(size(i, o) for i, o in self.of(roles))

    @property
    def kv(self) -> int:
        """Widths of the values of every attention, added up."""
        return self.sum("v", lambda i, o: o)

    @property
    def width(self) -> int:
        return self.linears["q"][0][0]

    def count(self, role: str) -> int:
        return len(self.linears[role])


@functools.cache
def tree(family: str) -> Tree:
    found = FAMILIES[ROLES.get(family, family)]
    cls, config = resolve(found.raw_config(), family)
    model: Any = cls(config)
    linears: dict[str, list[tuple[int, int]]] = {role: [] for role in _NAMES}
    norm_weights = biases = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            for role, pattern in _NAMES.items():
                if re.search(rf"(^|\.)({pattern})$", name):
                    linears[role].append((module.in_features, module.out_features))
        if "norm" in type(module).__name__.lower():
            norm_weights += module.weight.numel()
        if getattr(module, "bias", None) is not None:
            biases += module.bias.numel()
    kinds = 3 if config.is_encoder_decoder else 1
    return Tree(linears, norm_weights, biases, sum(p.numel() for p in model.parameters()), kinds)


Hyper = dict[str, Any]


def lora(t: Tree, h: Hyper, roles: str = "q v") -> int:
    return t.sum(roles, lambda i, o: h["r"] * (i + o))


def bottlenecks(t: Tree, r: int, *, attention: bool = False, ffn: bool = False, extra: int = 0) -> int:
    one = r * t.width + r + t.width * r + t.width + extra
    return one * (attention * t.count("q") + ffn * t.count("down"))


def prefix(t: Tree, h: Hyper) -> int:
    return 2 * h["l"] * t.kv


def compacter(t: Tree, h: Hyper) -> int:
    n, r, k, d = h["n"], h["r"], h["k"], t.width
    site = n * (r // n) * k + n * k * (d // n) + r + n * (d // n) * k + n * k * (r // n) + d
    return 2 * n * n * n + site * (t.count("q") + t.count("down"))


def unipelt(t: Tree, h: Hyper) -> int:
    gates = t.sum("q v", lambda i, o: i) + t.sum("q", lambda i, o: i) + t.width * t.count("down")
    return lora(t, {"r": h["r_lora"]}) + prefix(t, h) + bottlenecks(t, h["r"], ffn=True) + gates


def prefix_mlp(t: Tree, h: Hyper) -> int:
    shared = h["l"] * t.width + h["m"] * t.width + h["m"]
    return t.kinds * shared + t.sum("v", lambda i, o: 2 * o * h["m"] + 2 * o)


def randlora(t: Tree, h: Hyper) -> int:
    return t.sum("q v", lambda i, o: -(-min(i, o) // h["r"]) * (h["r"] + min(i, o)))


ALL = "q k v o up gate down"
ADAPTED: dict[str, Callable[[Tree, Hyper], int]] = {
    "adalora": lambda t, h: t.sum(ALL, lambda i, o: h["r"] * (i + o + 1)),
    "bitfit": lambda t, h: t.biases,
    "c3a": lambda t, h: t.sum("q v", lambda i, o: (o // h["b"]) * (i // h["b"]) * h["b"]),
    "compacter": compacter,
    "dora": lambda t, h: lora(t, h) + t.sum("q v", lambda i, o: o),
    "fourierft": lambda t, h: h["n"] * len(t.of("q v")),
    "full": lambda t, h: t.all,
    "hira": lora,
    "houlsby": lambda t, h: bottlenecks(t, h["r"], attention=True, ffn=True),
    "hra": lambda t, h: t.sum("q v", lambda i, o: h["r"] * i),
    "ia3": lambda t, h: t.sum("k v up", lambda i, o: o),
    "llama_adapter": lambda t, h: prefix(t, h) + HEADS * t.count("q"),
    "ln_tuning": lambda t, h: 2 * t.norm_weights,
    "loha": lambda t, h: 2 * lora(t, h),
    "lokr": lambda t, h: t.sum("q v", lambda i, o: h["k"] ** 2 + h["r"] * (o // h["k"] + i // h["k"])),
    "lora": lora,
    "lora_ffn": lambda t, h: lora(t, h, "up down"),
    "lora_linear": lambda t, h: lora(t, h, ALL),
    "loreft": lambda t, h: t.count("down") * (2 * h["r"] * t.width + h["r"]),
    "mam": lambda t, h: prefix(t, h) + bottlenecks(t, h["r"], ffn=True),
    "mh_pa": lambda t, h: t.sum("q", lambda i, o: HEADS * (h["r"] * i + h["r"]) + o * h["r"] + o),
    "miss": lambda t, h: t.sum("q v", lambda i, o: h["r"] * o),
    "moe_lora": lambda t, h: t.sum("q v", lambda i, o: h["e"] * (i + h["r"] * (i + o))),
    "norm_tuning": lambda t, h: t.norm_weights,
    "oft": lambda t, h: t.sum("q v", lambda i, o: (i // h["b"]) * (h["b"] * (h["b"] - 1) // 2)),
    "pa_attn": lambda t, h: bottlenecks(t, h["r"], attention=True),
    "pa_ffn": lambda t, h: bottlenecks(t, h["r"], ffn=True),
    "pa_pa": lambda t, h: bottlenecks(t, h["r_attn"], attention=True) + bottlenecks(t, h["r_ffn"], ffn=True),
    "pfeiffer": lambda t, h: bottlenecks(t, h["r"], ffn=True),
    "prefix": prefix,
    "prefix_gated": prefix,
    "prefix_lora": lambda t, h: prefix(t, h) + lora(t, h, "up down"),
    "prefix_mlp": prefix_mlp,
    "prefix_ungated": prefix,
    "prompt": lambda t, h: h["l"] * t.width,
    "randlora": randlora,
    "road": lambda t, h: t.sum("q v", lambda i, o: o),
    "rslora": lora,
    "scaled_pa": lambda t, h: bottlenecks(t, h["r"], ffn=True),
    "scaled_pa_learned": lambda t, h: bottlenecks(t, h["r"], ffn=True, extra=1),
    "seq_attn": lambda t, h: bottlenecks(t, h["r"], attention=True),
    "seq_ffn": lambda t, h: bottlenecks(t, h["r"], ffn=True),
    "shira": lora,
    "unipelt": unipelt,
    "vera": lambda t, h: t.sum("q v", lambda i, o: h["r"] + o),
}
"""What each rule of the library trains, on families whose projections are layers of their own."""
