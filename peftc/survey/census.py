"""What a model should have, counted from the class names of its module tree: attentions, FFNs, blocks of experts.

A name is what the authors of a model say a module is, and no finder of peftc looks at one. Calls are counted, not
modules: a layer that runs twice has two attentions in the graph. Which modules run at all is read from the module
stack that the tracer writes at each node.
"""

from __future__ import annotations

import itertools
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
    r"Attention\w*(Output|Layer|Block|Pool\w*|Bias|Mask|Norm|Residual|Embedding|Head|Gate|Indexer|Projection)$|Rotary"
)
LINEAR_ATTENTION = re.compile(
    r"Lightning|Linear|Additive|LSH|GatedDelta|DeltaAttention|Fourier|Conv|Deformable|Retention|AFT"
)
"""Attentions without a softmax over keys, or with sampled or hashed keys, by what follows the model's own name."""
LINEAR_MODELS = re.compile(r"Nystrom|Rwkv|Yoso|Mra")
"""Models that have no other attention."""
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

_VALUES = re.compile(r"(^|_)value$")


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
        """A `ModuleDict` is never called itself; what it holds is.

        One whose linear layers all run twice works on two streams in one call (PEGASUS-X), and so does one that makes
        values twice (LiLT); one that the model put there while it ran (BigBird) is known to the tracer by them alone.
        """
        held = model.get_submodule(path)
        names = (
            [path] if type(held).__name__ != "ModuleDict" else [f"{path}.{name}" for name, _ in held.named_children()]
        )
        own = [calls[f"{path}.{name}"] for name in _linears(held)]
        values = sum(calls[f"{path}.{name}"] for name in _linears(held) if _VALUES.search(name))
        return max([*(calls[name] for name in names), min(own, default=0), values])

    def called(kind: str) -> tuple[str, ...]:
        return tuple(path for path, its in kinds.items() if its == kind for _ in range(times(path)))

    return Census(called("attention"), called("linear_attention"), called("ffn"), called("experts"))


def _linears(module: torch.nn.Module) -> list[str]:
    """The linear layers directly in a module; of an FFN that stands in its layer the two that are named so."""
    names = [name for name, child in module.named_children() if type(child).__name__ == "Linear"]
    pairs = [list(pair) for pair in PAIRS if set(pair) <= set(names)]
    return pairs[0] if pairs else names


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
    own = type(model).__name__
    for path, module in model.named_modules():
        kind = _kind(module, own)
        if kind is not None and not _in_norm(model, path):
            kinds[path] = kind
    inside = layered(model, kinds)
    found = {path: kind for path, kind in kinds.items() if inside(path) and not _holds_another(path, kind, kinds)}
    return {path: kind for path, kind in found.items() if not (kind == "ffn" and _shared_expert(path, found, kinds))}


def _in_norm(model: torch.nn.Module, path: str) -> bool:
    """Whether the module makes the scale of a norm, as in A.X K2."""
    return type(model.get_submodule(path.rpartition(".")[0])).__name__.endswith("Norm")


def _shared_expert(path: str, found: dict[str, str], kinds: dict[str, str]) -> bool:
    """Whether it stands in a mixture beside the experts, which are counted once together with it (ERNIE 4.5 VL)."""
    mixture = path.rpartition(".")[0]
    beside = [other for other, kind in found.items() if kind == "ffn" and other.rpartition(".")[0] == mixture]
    routed = [o for o in beside if any(e.startswith(f"{o}.") and kind == "experts" for e, kind in kinds.items())]
    return kinds.get(mixture) == "ffn" and bool(routed) and path not in routed


def layered(model: torch.nn.Module, paths: Iterable[str]) -> Callable[[str], bool]:
    """Whether a module is in a layer, or of a class that is, of those at `paths`."""
    classes = {type(model.get_submodule(path)) for path in paths if _INDEX.search(path)}
    return lambda path: _of_a_layer(path, type(model.get_submodule(path)), classes)


def _of_a_layer(path: str, cls: type, layered: set[type]) -> bool:
    """Whether it is in a layer, or of a class that is; a plain `Sequential` tells nothing by its class."""
    return bool(_INDEX.search(path)) or (cls in layered and cls.__name__ != "Sequential")


_INDEX = re.compile(r"(^|\.)\d+(\.|$)")
"""A path inside a repeated layer. What is in none (a projector, a prediction head) is no block's part."""


def _kind(module: torch.nn.Module, model: str) -> str | None:
    name = type(module).__name__
    if not _matrices(module):
        return None
    if ATTENTION.search(name) and not NOT_ATTENTION.search(name):
        special = LINEAR_ATTENTION.search(_without(model, name)) or LINEAR_MODELS.search(name)
        return "linear_attention" if special else "attention"
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


def _without(model: str, name: str) -> str:
    """What follows the start that a class shares with its model's: "SelfAttention" of ConvBERT's."""
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(model, name, strict=False)))
    return name[shared:]


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
