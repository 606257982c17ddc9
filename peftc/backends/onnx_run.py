"""A written ONNX graph as a function on tensors by name, in onnxruntime on the CPU.

graph = OnnxGraph(Path("merged/model.onnx"), large=False)
(found,) = graph([{"input_ids": ids, **graph.no_past(len(ids))}])      # found["logits"], found["present.0.key"]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftc.backends.onnx_pieces import run_in_pieces

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OnnxGraph:
    """`large`: run a piece at a time, with little memory."""

    path: Path
    large: bool

    def __call__(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[Tensors]:
        """The outputs for each batch, by name; what the graph does not take of a batch is left out."""
        single = {value.name: value.type.tensor_type.elem_type == _FLOAT for value in self._graph.input}
        names = [value.name for value in self._graph.output]
        given = [
            {name: value.float() if single[name] else value for name, value in batch.items() if name in single}
            for batch in batches
        ]
        if self.large:
            return [dict(zip(names, found, strict=True)) for found in run_in_pieces(self.path, given)]
        feeds = [{name: value.contiguous().numpy() for name, value in batch.items()} for batch in given]
        found = [self._session.run(names, batch) for batch in feeds]
        return [dict(zip(names, map(torch.from_numpy, values), strict=True)) for values in found]

    def no_past(self, batch: int) -> Tensors:
        """Keys and values of no token, for every input that takes some: [batch, heads, 0, width]."""
        found: Tensors = {}
        for value in self._graph.input:
            if value.name.startswith("past_key_values."):
                sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
                dtype = torch.float16 if value.type.tensor_type.elem_type == _FLOAT16 else torch.float32
                found[value.name] = torch.zeros((batch, sizes[1], 0, sizes[3]), dtype=dtype)
        return found

    @functools.cached_property
    def _graph(self) -> Any:
        import onnx

        return onnx.load(str(self.path), load_external_data=False).graph

    @functools.cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])


_FLOAT, _FLOAT16 = 1, 10  # of onnx.TensorProto
