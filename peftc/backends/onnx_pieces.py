"""A written ONNX model run in onnxruntime a piece at a time, so that a model of any size is compared in little memory.

The graph is cut, in its order, where the weights of a piece would exceed `most` bytes; each piece is a session of its
own, made when its turn comes, for all batches, and dropped after. Peak memory: the weights of a piece, twice where they
are transposed, and what lies between two pieces.

    outputs = run_in_pieces(Path("merged/model.onnx"), [{"input_ids": ids, "attention_mask": mask}])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PIECE = 1 << 27
"""Bytes of weights of a piece; a larger weight is in a piece without another."""

Values = dict[str, Any]
"""Arrays by the names of the graph."""


def run_in_pieces(
    path: Path, batches: Sequence[Mapping[str, torch.Tensor]], most: int = PIECE
) -> list[list[torch.Tensor]]:
    """The outputs of the model at `path` for each of the batches, in the order of the graph's outputs."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    outputs = [value.name for value in model.graph.output]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {name: _nbytes(tensor) for name, tensor in weights.items()}
    pieces = list(_pieces(model.graph.node, sizes, most, frozenset(outputs)))
    last = {name: place for place, nodes in enumerate(pieces) for name in _from_outside(nodes)}
    last |= dict.fromkeys(outputs, len(pieces))
    known: list[Values] = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
    for place, nodes in enumerate(pieces):
        used = _from_outside(nodes)
        gives = [name for node in nodes for name in node.output if last.get(name, -1) > place]
        given = {name: known[0][name] for name in known[0] if name in used}
        if gives:
            piece = _piece(model, nodes, given, gives, [weights[name] for name in sorted(used) if name in weights])
            _run(piece, path.parent, known, gives)
        for values in known:
            for name in [name for name in values if last.get(name, -1) <= place]:
                del values[name]
    return [[torch.from_numpy(values[name]) for name in outputs] for values in known]


def _run(piece: bytes, directory: Path, known: list[Values], gives: list[str]) -> None:
    """Run one piece for every batch; what it gives is put beside what it was given."""
    session = _session(piece, directory)
    wanted = [argument.name for argument in session.get_inputs()]
    for values in known:
        found = session.run(gives, {name: values[name] for name in wanted})
        values.update(zip(gives, found, strict=True))


def _pieces(nodes: Iterable[Any], sizes: Mapping[str, int], most: int, results: frozenset[str]) -> Iterator[list[Any]]:
    """Nodes that follow each other and whose weights together have at most `most` bytes.

    What is computed from weights alone (a transposed one) is computed in each piece that reads it, not passed on.
    """
    fixed: dict[str, Any] = {}
    piece: list[Any] = []
    held: set[str] = set()
    for node in nodes:
        if results.isdisjoint(node.output) and all(name in sizes or name in fixed for name in _reads(node)):
            fixed.update(dict.fromkeys(node.output, node))
            continue
        needed = _fixed_before(node, fixed)
        weights = {name for one in (*needed, node) for name in _reads(one) if name in sizes}
        if held and sum(sizes[name] for name in held | weights) > most:
            yield piece
            piece, held = [], set()
        there = {name for one in piece for name in one.output}
        piece += [one for one in needed if there.isdisjoint(one.output)] + [node]
        held |= weights
    yield piece


def _from_outside(nodes: Sequence[Any]) -> set[str]:
    """What the nodes read and do not compute."""
    made = {name for node in nodes for name in node.output}
    return {name for node in nodes for name in _reads(node)} - made


def _fixed_before(node: Any, fixed: Mapping[str, Any]) -> list[Any]:
    """The nodes that compute from weights what a node reads, in the order in which they run."""
    found: dict[int, Any] = {}
    for name in _reads(node):
        if name in fixed:
            found.update({id(one): one for one in (*_fixed_before(fixed[name], fixed), fixed[name])})
    return list(found.values())


def _reads(node: Any) -> Iterator[str]:
    """What a node reads, the graphs inside it included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


def _nbytes(tensor: Any) -> int:
    import onnx

    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _piece(model: Any, nodes: Sequence[Any], given: Values, gives: Sequence[str], weights: Sequence[Any]) -> bytes:
    """A model of these nodes. What it is given has the dtypes and ranks of the first batch."""
    import onnx
    from onnx import helper

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in given.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in gives]
    graph = helper.make_graph(nodes, "piece", inputs, outputs, weights)
    made = helper.make_model(
        graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
    return made.SerializeToString()


def _session(piece: bytes, directory: Path) -> Any:
    """A session that copies no weight: what an optimizer would fold or pack is wanted once only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return onnxruntime.InferenceSession(piece, options, providers=["CPUExecutionProvider"])
