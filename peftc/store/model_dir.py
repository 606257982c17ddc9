"""A model directory as transformers writes it: config.json, safetensors weights, tokenizer files.

Opening one reads JSON and tensor headers only. Weights are optional: a directory that holds a config alone can be
planned and adapted, only not merged.

    base = ModelDir.open("all-MiniLM-L6-v2")
    base.config["model_type"]                      # "bert"
    base.read("encoder.layer.0.output.dense.bias") # a tensor
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peftc.diagnostics import did_you_mean, fail
from peftc.store.fingerprint import Fingerprint, fingerprint_of
from peftc.store.safetensors_io import Header, TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    import torch

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTED: Final = "peftc.json"

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "*.bpe.model",
    "spiece.model",
    "sentencepiece*.model",
    "bpe.codes",
    "dict.txt",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
PROCESSOR_FILES: Final = ("generation_config.json", "*processor_config.json")

_OTHER_WEIGHTS: Final = (
    "pytorch_model*.bin",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "*.gguf",
    "consolidated*",
    "model.*.safetensors",
)
_CONVERT: Final = (
    "write them as safetensors: "
    'python -c "from transformers import AutoModel as M; M.from_pretrained(SRC).save_pretrained(DST)", '
    "with the Auto class of your head in place of AutoModel"
)


@dataclass(frozen=True, slots=True)
class ModelDir:
    """An opened model directory; `tensors` maps a name to the header of its file and what the header says of it."""

    path: Path
    config: dict[str, Any]
    headers: tuple[Header, ...] = ()
    tensors: dict[str, tuple[Header, TensorInfo]] = field(default_factory=dict)
    tokenizer_files: tuple[Path, ...] = ()

    @staticmethod
    def open(path: str | Path) -> ModelDir:
        """Open a model directory; no weight is read.

        Raises:
            PeftcError: E030, this is not a model directory; E031, weights are truncated, missing, or in disorder.
        """
        path = Path(path)
        try:
            config = _read_config(path)
            headers = _read_headers(path)
            tokenizer_files = _matching(path, TOKENIZER_FILES)
        except OSError as error:
            fail("E030", f"{path} cannot be read: {error.strerror or error}", help="check the path and its permissions")
        tensors = {name: (header, info) for header in headers for name, info in header.tensors.items()}
        return ModelDir(path, config, headers, tensors, tokenizer_files)

    @property
    def has_weights(self) -> bool:
        return bool(self.headers)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(info.nbytes for _, info in self.tensors.values())

    def refuse_adapted(self) -> None:
        """Refuse a directory that peftc itself wrote.

        Raises:
            PeftcError: E033, the directory holds peftc.json.
        """
        if (self.path / ADAPTED).exists():
            message = f"{self.path} is already adapted: it holds deltas ({ADAPTED})"
            fail("E033", message, help="apply the rule to the base model, or merge this directory first: peftc merge")

    def require_weights(self) -> None:
        """Refuse a directory that holds a config alone.

        Raises:
            PeftcError: E030, there are no weights.
        """
        if not self.has_weights:
            fail("E030", f"{self.path} holds no weights, only {CONFIG}", help=f"put {WEIGHTS} beside {CONFIG}")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            PeftcError: E040, there is no such tensor; E031, the file cannot be read.
        """
        if name not in self.tensors:
            fail("E040", f"{self.path} has no tensor `{name}`", help=did_you_mean(name, self.tensors))
        return read_tensor(self.tensors[name][0], name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, (_, info) in self.tensors.items()}

    def fingerprint(self) -> str:
        """A sha256 over config, tensor names and samples of their bytes; the way files are sharded does not matter."""
        return self.fingerprint_parts().digest

    def fingerprint_parts(self) -> Fingerprint:
        """The same in parts, so that two that differ can say in what."""
        return fingerprint_of(self.config, self.tensors)

    def support_files(self) -> tuple[Path, ...]:
        """Tokenizer, processor and generation files."""
        return _matching(self.path, TOKENIZER_FILES + PROCESSOR_FILES)

    def copy_support_files(self, dest: str | Path) -> list[Path]:
        """Copy tokenizer, processor and generation files (not the config, not weights); return the copies."""
        copies = []
        for source in self.support_files():
            copy = Path(dest) / source.relative_to(self.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)  # follows links: the hub's cache is made of them
            copies.append(copy)
        return copies


def _matching(path: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    found = {entry for pattern in patterns for entry in path.glob(pattern) if entry.is_file()}
    return tuple(sorted(found))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        fail("E030", f"{path} does not exist", help=_nearby(path))
    if not path.is_dir():
        fail("E030", f"{path} is a file, not a model directory", help=f"give the directory that holds {CONFIG}")
    file = path / CONFIG
    if not file.exists():
        fail("E030", f"{path} is not a model directory: there is no {CONFIG}", help=_what_it_is(path))
    config = _read_json(file, code="E030")
    if not isinstance(config, dict):
        fail("E030", f"{file} is not a JSON object", help="was the download cut short?")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        fail("E030", f"{file} names no model_type", help="only models of the transformers library can be adapted")
    return config


def _read_json(file: Path, *, code: str) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        fail(code, f"{file}: cannot be read: {error.strerror or error}", help="check its permissions")
    except (ValueError, RecursionError) as error:
        fail(code, f"{file} is not valid JSON: {error}", help="was the download cut short?")


def _nearby(path: Path) -> str:
    parent = path.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = did_you_mean(path.name, names) if len(path.parts) > 0 and names else None
    if near and near.startswith("did"):
        return near
    return f"give a local directory that holds {CONFIG}; peftc downloads nothing"


def _what_it_is(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return "this is a PEFT adapter: give the directory of its base model"
    if (path / "model_index.json").exists():
        return "this is a diffusers pipeline: give one of its model directories, such as text_encoder/"
    inside = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG}"))
    if inside:
        return f"did you mean {path / inside[0]}?"
    return f"give the directory that holds {CONFIG} and {WEIGHTS}"


def _read_headers(path: Path) -> tuple[Header, ...]:
    if (path / WEIGHTS).exists() or (path / WEIGHTS).is_symlink():
        return (read_header(path / WEIGHTS),)
    if (path / INDEX).exists():
        return _read_shards(path)
    other = _matching(path, _OTHER_WEIGHTS)
    if other:
        message = f"{path} holds its weights as {other[0].name}; peftc reads {WEIGHTS} (or shards and their index) only"
        fail("E030", message, help=_CONVERT)
    return ()


def _read_shards(path: Path) -> tuple[Header, ...]:
    index = path / INDEX
    document = _read_json(index, code="E031")
    placed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        fail("E031", f"{index} has no weight_map of tensor names to files", help="download the file again")
    files = sorted(set(placed.values()))
    for file in files:
        if Path(file).name != file:
            fail("E031", f"{index} names a file outside its directory: {file}", help="download the file again")
    missing = [file for file in files if not (path / file).exists()]
    if missing:
        fail("E031", f"{path} lacks {len(missing)} of {len(files)} shards: {_some(missing)}", help="download again")
    headers = tuple(read_header(path / file) for file in files)
    _check_index(index, placed, headers)
    return headers


def _check_index(index: Path, placed: Mapping[str, str], headers: tuple[Header, ...]) -> None:
    actual = [(name, header.path.name) for header in headers for name in header.tensors]
    absent = sorted(set(placed.items()) - set(actual))
    if absent:
        message = f"{index} places {len(absent)} tensors in files that lack them: {_some([n for n, _ in absent])}"
        fail("E031", message, help="index and shards are of different downloads: download them again")
    extra = sorted(set(actual) - set(placed.items()))
    if extra:
        message = f"{index} does not list {len(extra)} tensors of its shards: {_some([n for n, _ in extra])}"
        fail("E031", message, help="index and shards are of different downloads: download them again")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
