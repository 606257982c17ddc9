"""The rates of a model's dropout modules as they are now, for a graph that was traced with what they were.

TRL sets `p` of every `torch.nn.Dropout` to 0 (`disable_dropout`), and users change it between two runs; a graph holds
numbers. A module that an attention hands to its kernel, and does not call, counts as well. Rates that are no module's
(BART's) stay those of the trace, as attributes of a config do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx
from torch.nn.modules.dropout import _DropoutNd

from peftc.ir.program import is_call, module_path

aten = torch.ops.aten

_RATE: Final = 1
_SDPA_RATE: Final = 4


@torch.compiler.disable
def places(graph: fx.Graph, module: Callable[[str], torch.nn.Module]) -> dict[str, str]:
    """The names of the nodes that drop at the rate of a module, with the module's path."""
    nodes = [node for node in graph.nodes if is_call(node, aten.dropout.default, aten.feature_dropout.default)]
    called = {node.name: path for node in nodes if isinstance(module(path := _path(node)), _DropoutNd)}
    taken = set(called.values())
    for node in graph.nodes:
        if is_call(node, aten.scaled_dot_product_attention.default) and len(node.args) > _SDPA_RATE:
            own = [name for name, child in module(_path(node)).named_children() if isinstance(child, _DropoutNd)]
            left = [path for name in own if (path := f"{_path(node)}.{name}") not in taken]
            if len(left) == 1:
                called[node.name] = left[0]
    return called


def set_rates(nodes: Mapping[str, fx.Node], rates: Mapping[str, float]) -> None:
    """Give nodes, by the names they have in `rates`, their rates."""
    for name, rate in rates.items():
        node = nodes[name]
        node.update_arg(_SDPA_RATE if is_call(node, aten.scaled_dot_product_attention.default) else _RATE, rate)


def rates_of(found: Mapping[str, str], module: Callable[[str], Any]) -> dict[str, float]:
    """The rate of each node of `places` now."""
    return {name: module(path).p for name, path in found.items()}


def _path(node: fx.Node) -> str:
    return module_path(node).partition("@")[0]  # a module that is called again is `path@1`
