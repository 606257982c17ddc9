"""An exported model in onnxruntime against the unfolded model in torch.

Up to `WHOLE` bytes of a base both are run whole; beyond, torch goes a weight at a time and onnxruntime a piece of the
graph at a time, so that the memory of a comparison does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftc.adapted import Adapted
from peftc.backends.onnx import OnnxFiles
from peftc.backends.onnx_pieces import run_in_pieces
from peftc.certify import Comparison, Inputs, compared
from peftc.comparing import TOLERANCE, WHOLE, batches_for, unfolded, unfolded_from_disk, vocabulary_of, word
from peftc.frontend.trace import InputSpec

Outputs = list[list[torch.Tensor]]
"""A list of outputs for each batch."""


def compare_onnx(
    adapted: Adapted, files: OnnxFiles, specs: Mapping[str, InputSpec], texts: Sequence[str]
) -> list[Comparison]:
    """The exported model in onnxruntime against the unfolded model."""
    batches = batches_for(adapted, specs, texts)
    inputs = [given for _, given in batches]
    before, after = in_torch(adapted, specs, inputs), in_onnxruntime(files.path, inputs, large=is_large(adapted))
    return [
        compared("model.onnx in onnxruntime", label, given, one, other, TOLERANCE[adapted.dtype], word(adapted.dtype),
                 vocabulary_of(adapted))
        for (label, given), one, other in zip(batches, before, after, strict=True)
    ]  # fmt: skip


def is_large(adapted: Adapted) -> bool:
    """Whether neither model is to be held in memory."""
    return adapted.base.nbytes > WHOLE


def in_torch(adapted: Adapted, specs: Mapping[str, InputSpec], inputs: Sequence[Inputs]) -> Outputs:
    """What the unfolded model answers."""
    if is_large(adapted):
        return unfolded_from_disk(adapted, specs, torch.float32, inputs)
    run = unfolded(adapted.model, specs)
    return [list(run(given)) for given in inputs]


def in_onnxruntime(path: Path, inputs: Sequence[Inputs], *, large: bool) -> Outputs:
    """What the model at `path` answers; inputs that it does not take are left out."""
    if large:
        return run_in_pieces(path, inputs)
    session: Any = session_of(path)
    wanted = {argument.name for argument in session.get_inputs()}
    feeds = [{name: tensor.numpy() for name, tensor in given.items() if name in wanted} for given in inputs]
    return [[torch.from_numpy(value) for value in session.run(None, given)] for given in feeds]


def session_of(path: Path) -> Any:
    """A session on the CPU that keeps its warnings to itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
