"""What a model should have, counted from the class names of its module tree: attentions, FFNs, blocks of experts.

A name is what the authors of a model say a module is, and no finder of peftc looks at one. Calls are counted, not
modules: a layer that runs twice has two attentions in the graph. Which modules run at all is read from the module
stack that the tracer writes at each node.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from peftc.ir.program import Program

ATTENTION = re.compile(r"Attention|Attn")
NOT_ATTENTION = re.compile(
    r"Attention\w*(Output|Layer|Block|Pool\w*|Bias|Mask|Norm|Residual|Embedding|Head|Gate|Indexer)$|Rotary"
)
LINEAR_ATTENTION = re.compile(
    r"Lightning|Linear|Additive|LSH|GatedDelta|Kimi\w*Delta|Fourier|Conv|Deformable|Nystrom|Rwkv|Retention|AFT|Yoso|Mra"
)
"""Attentions without a softmax over keys, or with sampled or hashed keys."""
FFN = re.compile(
    r"SparseMoe\w*$|M[oO]EBlock$|MoeBlock$|M[oO]E$|Moe$|"
    r"MLP$|Mlp$|FeedForward|FFN$|Intermediate$|FeedForwardNetwork|DenseActDense|DenseGatedActDense|PositionWise"
)
EXPERTS = re.compile(r"Experts$")
PAIRS = (
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("fc_in", "fc_out"),
    ("wi", "wo"),
    ("w1", "w2"),
    ("ffn", "ffn_output"),
    ("c_fc", "c_proj"),
)
"""Names of the two linear layers of an FFN that stand in its layer directly."""


@dataclass(frozen=True, slots=True)
class Census:
    """Calls of modules of each kind in one forward, with their paths."""

    attention: tuple[str, ...]
    linear_attention: tuple[str, ...]
    ffn: tuple[str, ...]
    experts: tuple[str, ...]


def take(model: torch.nn.Module, program: Program) -> Census:
    """Count what runs in the traced graph."""
    calls = _calls(program)
    kinds = _kinds(model)

    def times(path: str) -> int:
        """A `ModuleDict` is never called itself; what it holds is."""
        held = model.get_submodule(path)
        names = (
            [path] if type(held).__name__ != "ModuleDict" else [f"{path}.{name}" for name, _ in held.named_children()]
        )
        return max(calls[name] for name in names)

    def called(kind: str) -> tuple[str, ...]:
        return tuple(path for path, its in kinds.items() if its == kind for _ in range(times(path)))

    return Census(called("attention"), called("linear_attention"), called("ffn"), called("experts"))


def _calls(program: Program) -> Counter[str]:
    """How often each module runs: the tracer numbers the second call of one module and those after it."""
    seen: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        for key, entry in (node.meta.get("nn_module_stack") or {}).items():
            path = str(entry[0])
            seen.setdefault(path.partition("@")[0], set()).add(key)
    return Counter({path: len(keys) for path, keys in seen.items()})


def _kinds(model: torch.nn.Module) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            kinds[path] = kind
    inside = layered(model, kinds)
    return {path: kind for path, kind in kinds.items() if inside(path) and not _holds_another(path, kind, kinds)}


def layered(model: torch.nn.Module, paths: Iterable[str]) -> Callable[[str], bool]:
    """Whether a module is in a layer, or of a class that is, of those at `paths`."""
    classes = {type(model.get_submodule(path)) for path in paths if _INDEX.search(path)}
    return lambda path: _of_a_layer(path, type(model.get_submodule(path)), classes)


def _of_a_layer(path: str, cls: type, layered: set[type]) -> bool:
    """Whether it is in a layer, or of a class that is; a plain `Sequential` tells nothing by its class."""
    return bool(_INDEX.search(path)) or (cls in layered and cls.__name__ != "Sequential")


_INDEX = re.compile(r"(^|\.)\d+(\.|$)")
"""A path inside a repeated layer. What is in none (a projector, a prediction head) is no block's part."""


def _kind(module: torch.nn.Module) -> str | None:
    name = type(module).__name__
    if not _matrices(module):
        return None
    if ATTENTION.search(name) and not NOT_ATTENTION.search(name):
        return "linear_attention" if LINEAR_ATTENTION.search(name) else "attention"
    if EXPERTS.search(name):
        return "experts"
    children = {child for child, _ in module.named_children()}
    if name == "Sequential":
        return "ffn" if _back_to_its_width(module) else None
    if _chain(module):
        return None
    if FFN.search(name) or any(set(pair) <= children for pair in PAIRS):
        return "ffn"
    return None


def _back_to_its_width(module: torch.nn.Module) -> bool:
    """Whether two linear layers lead to the width that they started from; other pairs make a bias, or a head."""
    linears: list[Any] = [child for child in module.children() if type(child).__name__ == "Linear"]
    return len(linears) == 2 and linears[0].in_features == linears[1].out_features


def _chain(module: torch.nn.Module) -> bool:
    """Whether it is a head of many linear layers in a row: a list of them stands beside others."""
    lists: list[Any] = [child for child in module.children() if type(child).__name__ == "ModuleList"]
    return any(len(each) > 0 and all(type(part).__name__ == "Linear" for part in each) for each in lists)


def _matrices(module: torch.nn.Module) -> int:
    return sum(parameter.dim() >= 2 for parameter in module.parameters())


def _holds_another(path: str, kind: str, kinds: dict[str, str]) -> bool:
    """Whether a module of the same kind is inside: the innermost one is the attention, the outer ones wrap it."""
    return any(other != path and other.startswith(f"{path}.") and its == kind for other, its in kinds.items())
