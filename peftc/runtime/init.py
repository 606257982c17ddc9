"""How delta parameters start: each from its own random stream, seeded by the run's seed and the parameter's name,
so that values depend neither on the order of parameters nor on the rest of the rule.

    start = Initializer(plan.parameters, 0, read=stored.__getitem__, saved=SavedDeltas(base))
    start("encoder.layer.0.attention.peftc.lora.q.A")

A start over frozen weights reads these one by one, when its turn comes, and keeps none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.ir.initial import Saved, Stored
from peftc.ir.program import DeltaParameter
from peftc.lang.init_graph import InitGraph, Source, compute_dtype

Read = Callable[[str], torch.Tensor]
"""Reads a parameter of the base by its state-dict name."""


class Initializer:
    """The initial values of `parameters`, by name.

    Those of one delta at one site are computed together, for they often share a decomposition, and kept until another
    site is asked for. Computed in float32, in float64 for a float64 parameter, and rounded once to the parameter's
    dtype. Raises `PeftcError` E042 where a start holds NaN or infinity, and what `read` raises.
    """

    def __init__(
        self,
        parameters: Mapping[str, DeltaParameter],
        seed: int,
        read: Read,
        saved: Callable[[Saved], torch.Tensor],
    ) -> None:
        self._parameters = parameters
        self._seed = seed
        self._read = read
        self._saved = saved
        self._group = ""
        self._values: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if parameter.init.recipe is None:
            return initialize(parameter, self._seed)
        group = name.rpartition(".")[0]
        if group != self._group or name not in self._values:
            members = [p for other, p in self._parameters.items() if other.rpartition(".")[0] == group]
            self._values = self._compute([p for p in members if p.init.recipe is not None])
            self._group = group
        return self._values.pop(name)

    def _compute(self, members: list[DeltaParameter]) -> dict[str, torch.Tensor]:
        graph = InitGraph(compute_dtype(members))
        for parameter in members:
            graph.add(parameter)
        values = _run(graph, self._source)
        for parameter in members:
            if not torch.isfinite(values[parameter.name]).all():
                recipe = parameter.init.recipe
                span = recipe.expr.span if recipe is not None else None
                fail("E042", f"the start of {parameter.name} holds NaN or infinity", span=span, help="check its `init`")
        return values

    def _source(self, what: Source, streams: dict[str, torch.Generator]) -> torch.Tensor:
        if isinstance(what, Stored):
            tensor = self._read(what.name).detach().cpu()
            tensor = tensor.transpose(-2, -1) if what.transposed else tensor
            return tensor if what.rows is None else tensor[list(what.rows)]
        if isinstance(what, Saved):
            return self._saved(what)
        if isinstance(what, DeltaParameter):
            return initialize(what, self._seed)
        stream = streams.setdefault(what.parameter, _generator(self._seed, what.parameter))
        return draw(what.name, what.arguments, torch.empty(what.shape), stream)


def _run(
    graph: InitGraph, source: Callable[[Any, dict[str, torch.Generator]], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values of the graph; each tensor is dropped after its last reader."""
    wanted = {node: name for name, node in graph.values.items()}
    readers = {node: len(node.users) for node in graph.graph.nodes}
    streams: dict[str, torch.Generator] = {}
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node in graph.sources:
            values[node] = source(graph.sources[node], streams).to(graph.dtype)
        else:
            given: Any = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            target: Any = node.target
            with torch.no_grad():
                values[node] = target(*given[0], **given[1])
        for operand in node.all_input_nodes:
            readers[operand] -= 1
            if readers[operand] == 0 and operand not in wanted:
                del values[operand]
    return {name: values[node].contiguous().clone() for name, node in graph.values.items()}


def initialize(parameter: DeltaParameter, seed: int) -> torch.Tensor:
    """A new tensor of the parameter's shape and dtype on the CPU, drawn as its `init` says (no recipe)."""
    tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
    return draw(parameter.init.name, parameter.init.arguments, tensor, _generator(seed, parameter.name))


def draw(name: str, arguments: tuple[float, ...], tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill `tensor`. fan_in is the last axis of the shape, fan_out the one before it (weights are [out, in])."""
    fan_in = tensor.shape[-1] if tensor.dim() else 1
    fan_out = tensor.shape[-2] if tensor.dim() > 1 else fan_in
    with torch.no_grad():
        match name:
            case "zeros":
                return tensor.zero_()
            case "ones":
                return tensor.fill_(1.0)
            case "constant":
                return tensor.fill_(arguments[0])
            case "normal":
                return tensor.normal_(0.0, arguments[0], generator=generator)
            case "uniform":
                return tensor.uniform_(-arguments[0], arguments[0], generator=generator)
            case "kaiming_uniform":
                bound = 1 / math.sqrt(fan_in)
                return tensor.uniform_(-bound, bound, generator=generator)
            case "kaiming_normal":
                return tensor.normal_(0.0, math.sqrt(2 / fan_in), generator=generator)
            case "xavier_uniform":
                bound = math.sqrt(6 / (fan_in + fan_out))
                return tensor.uniform_(-bound, bound, generator=generator)
            case "eye":
                return tensor.zero_().fill_diagonal_(1.0)
    raise ValueError(f"unknown init {name}")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
