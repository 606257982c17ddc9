"""`.onnx_adapter` files: onnxruntime's format of named tensors, with the number of the model that they are for.

The number is 31 bits of a hash of the base's fingerprint, which the format keeps as its model version.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import fail

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
SUFFIX = ".onnx_adapter"


def model_number(fingerprint: str) -> int:
    """The number by which an adapter knows its model."""
    return int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:4], "big") >> 1


def ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a file or an input that it cannot take; most are exceptions of its own."""
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # compiled, without types
    own = (state.Fail, state.InvalidArgument, state.NoSuchFile, state.InvalidGraph, state.InvalidProtobuf)
    return (*own, state.RuntimeException, state.NotImplemented, RuntimeError, ValueError, TypeError)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is ready to run: `handle` must live as long as a run that uses it, or the base's output comes."""

    path: Path
    model: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    handle: Any


def write_adapter(path: Path, tensors: Mapping[str, np.ndarray], model: int) -> None:
    """Write `tensors` as an adapter of the model of this number."""
    import numpy as np
    import onnxruntime

    kept = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in kept.items()}
    document: Any = onnxruntime.AdapterFormat()
    document.set_adapter_version(FORMAT)
    document.set_model_version(model)
    document.set_parameters(values)
    document.export_adapter(str(path))
    del values, kept  # the format reads their memory until the file is written


def read_adapter(path: str | Path) -> Adapter:
    """Read a file. Raises `PeftcError` E091 where it is no adapter or of another format."""
    import onnxruntime

    runtime: Any = onnxruntime  # its types lack adapters
    path = Path(path)
    if not path.is_file():
        fail("E091", f"{path} does not exist" if not path.exists() else f"{path} is no file")
    handle = runtime.LoraAdapter()
    try:
        document = runtime.AdapterFormat.read_adapter(str(path))
        handle.Load(str(path))
    except ort_errors():
        fail("E091", f"{path} is no whole adapter file", help="export it again: `peftc merge --export onnx --adapters`")
    if document.get_adapter_version() != FORMAT:
        found = document.get_adapter_version()
        fail("E091", f"{path} is of format {found}; this peftc reads {FORMAT}", help="export it again")
    values = document.get_parameters()
    shapes = {name: tuple(value.shape()) for name, value in values.items()}
    dtypes = {name: value.data_type() for name, value in values.items()}
    return Adapter(path, document.get_model_version(), shapes, dtypes, handle)
