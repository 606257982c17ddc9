"""An adapter directory as it lies on the disk: its configuration, and its tensors read one at a time.

    adapter = Adapter.open("my-lora")
    adapter.config["peft_type"]         # "LORA"
    adapter.tensors["base_model.model.lm_head.lora_A.weight"].shape

A pickled file is opened by `torch.load(weights_only=True)` alone, which runs none of its code.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peftc.diagnostics import fail
from peftc.store.safetensors_io import Header, dtype_code, read_header, read_tensor

if TYPE_CHECKING:
    import torch

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = ("adapter_model.bin", "pytorch_adapter.bin")
_STORED: Final = (WEIGHTS, "pytorch_adapter.safetensors", "model.safetensors")
_FLOATS: Final = frozenset({"F64", "F32", "BF16", "F16"})
_MOST_CONFIG: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of a tensor before it is read; `dtype` is the safetensors code."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter directory. Its tensors are floats, each of at least one axis and of no empty one."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    _header: Header | None = None
    _loaded: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def open(path: str | Path) -> Adapter:
        """Read the configuration and the headers. Raises `PeftcError`: E080, E031, E042 where a number is none."""
        path = Path(path)
        config = _read_config(path)
        stored = next((path / name for name in _STORED if (path / name).exists()), None)
        if stored is not None:
            header = read_header(stored)
            tensors = {name: Stored(info.dtype, info.shape) for name, info in header.tensors.items()}
            return _checked(Adapter(path, config, tensors, header), stored)
        pickled = next((path / name for name in _PICKLED if (path / name).exists()), None)
        if pickled is None:
            message = f"{path} holds {CONFIG} and no tensors"
            fail("E080", message, help=f"its tensors are in {WEIGHTS}; was the download cut short?")
        loaded = _unpickled(pickled)
        tensors = {name: Stored(_code(value), tuple(value.shape)) for name, value in loaded.items()}
        return _checked(Adapter(path, config, tensors, None, loaded), pickled)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises `PeftcError`: E031, E042 where it holds a number that is none."""
        import torch

        value = self._loaded[name] if self._header is None else read_tensor(self._header, name)
        if not torch.isfinite(value).all():
            fail(
                "E042", f"{self.path}: {name} holds NaN or infinity", help="the training diverged: use an earlier save"
            )
        return value


def _code(value: torch.Tensor) -> str:
    try:
        return dtype_code(value.dtype)
    except KeyError:
        return str(value.dtype)


def _checked(adapter: Adapter, file: Path) -> Adapter:
    if not adapter.tensors:
        fail("E080", f"{file} holds no tensor", help="a save of sharded parameters, that were not gathered, is empty")
    for name, info in adapter.tensors.items():
        if info.dtype not in _FLOATS:
            fail("E080", f"{file}: {name} is {info.dtype}, not a float", help="save the adapter unquantized")
        if not info.shape or 0 in info.shape:
            message = f"{file}: {name} is empty, of shape {list(info.shape)}"
            fail("E080", message, help="gather sharded parameters before saving, and save the adapter again")
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        fail("E080", f"{path} is no adapter: {_what_is_there(path)}", help=_nearby(path))
    try:
        if file.stat().st_size > _MOST_CONFIG:
            fail("E080", f"{file} is larger than {_MOST_CONFIG >> 20} MiB", help="this is no configuration")
        config = json.loads(file.read_bytes())
    except OSError as error:
        fail("E080", f"{file} cannot be read: {error.strerror or error}", help="check its permissions")
    except (ValueError, RecursionError) as error:
        fail("E080", f"{file} is not valid JSON: {error}", help="was the download cut short?")
    if not isinstance(config, dict):
        fail("E080", f"{file} is not a JSON object", help="was the download cut short?")
    return config


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "it does not exist"
    return f"there is no {CONFIG}" if path.is_dir() else "it is a file"


def _nearby(path: Path) -> str:
    inside = sorted(entry.parent for entry in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
    if inside:
        return f"did you mean {inside[0]}?"
    if (path / "peftc.json").is_file():
        return "this is a delta directory already; `peftc merge` and `peftc.load` take it"
    return "give the directory that `save_pretrained` of a PEFT model wrote"


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other protocols, which are refused or read all the same
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        cause = str(error).strip().splitlines()
        message = f"{file} cannot be read as plain tensors: {cause[0] if cause else type(error).__name__}"
        fail("E031", message, help=f"save the adapter as {WEIGHTS}; a pickle that holds more than tensors is not run")
    tensors = loaded if isinstance(loaded, dict) else {}
    if not tensors or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        fail("E031", f"{file} is no mapping of names to tensors", help=f"save the adapter as {WEIGHTS}")
    return tensors
