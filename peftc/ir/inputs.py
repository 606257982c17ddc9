"""The call of an exported program whose graph takes more inputs than its trace did."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree


def call_graph(traced: Sequence[Any], inputs: Sequence[str]) -> list[Any]:
    """The trace's call graph for a graph whose inputs are the placeholders of these names, in order.

    Inputs behind those of the trace are keyword arguments under the names of their placeholders. `traced` stays.
    """
    from torch.export.graph_signature import TensorArgument

    entries = list(traced)
    signature = entries[0].signature
    more = list(inputs[signature.in_spec.num_leaves :])
    if not more:
        return entries
    positional, keyword = signature.in_spec.children()
    leaves = pytree.tree_unflatten([0] * positional.num_leaves, positional)
    values = {
        name: pytree.tree_unflatten([0] * spec.num_leaves, spec)
        for name, spec in zip(keyword.context, keyword.children(), strict=True)
    }
    entries[0] = copy.copy(entries[0])
    entries[0].signature = copy.copy(signature)
    entries[0].signature.in_spec = pytree.tree_structure((leaves, {**values, **dict.fromkeys(more, 0)}))
    entries[0].signature.forward_arg_names = [*(signature.forward_arg_names or keyword.context), *more]
    entries[0].signature.inputs = [TensorArgument(name) for name in inputs]
    return entries
