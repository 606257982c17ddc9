"""Which base model a delta belongs to: a fingerprint cheap enough for any size.

The fingerprint covers the config without what differs between two saves of one model, every tensor's name, dtype and
shape, and a sample of every tensor's bytes (its first, middle and last 4 KiB). Retraining a model changes nearly every
tensor, so a sample of each tells; a change hidden between samples does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from peftc.store.safetensors_io import Header, TensorInfo, read_bytes

SAMPLE: Final = 4096
_VOLATILE: Final = ("transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Three sha256 in hex: the config; names, dtypes and shapes; sampled bytes. Without weights two are None."""

    config: str
    names: str | None = None
    contents: str | None = None

    @property
    def digest(self) -> str:
        return _sha256("\n".join((self.config, self.names or "", self.contents or "")).encode())

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Fingerprint:
        return Fingerprint(document["config"], document.get("names"), document.get("contents"))

    def differences(self, other: Fingerprint) -> list[str]:
        """In words, in what the two differ; weights are compared only where both have them."""
        found = ["the config"] if self.config != other.config else []
        if self.names and other.names and self.names != other.names:
            found.append("the names, dtypes or shapes of tensors")
        elif self.contents and other.contents and self.contents != other.contents:
            found.append("the contents of tensors")
        return found


def fingerprint_of(config: Mapping[str, Any], tensors: Mapping[str, tuple[Header, TensorInfo]]) -> Fingerprint:
    """The fingerprint of a config and its stored tensors.

    Raises:
        PeftcError: E031, a file cannot be read.
    """
    canonical = _sha256(json.dumps(canonical_config(config), sort_keys=True).encode())
    if not tensors:
        return Fingerprint(canonical)
    names, contents = hashlib.sha256(), hashlib.sha256()
    for name in sorted(tensors):
        header, info = tensors[name]
        names.update(f"{name}\0{info.dtype}\0{list(info.shape)}\n".encode())
        for start in _sample_starts(info.nbytes):
            contents.update(read_bytes(header, name, start, SAMPLE))
    return Fingerprint(canonical, names.hexdigest(), contents.hexdigest())


def sample_digests(tensors: Mapping[str, tuple[Header, TensorInfo]]) -> dict[str, str]:
    """Of each tensor's sampled bytes the first 16 hex digits of a sha256, so that one that changed can be named.

    Raises:
        PeftcError: E031, a file cannot be read.
    """
    found = {}
    for name, (header, info) in tensors.items():
        digest = hashlib.sha256()
        for start in _sample_starts(info.nbytes):
            digest.update(read_bytes(header, name, start, SAMPLE))
        found[name] = digest.hexdigest()[:16]
    return found


def canonical_config(value: Any) -> Any:
    """The config without volatile keys and with one spelling of its dtype, at every depth."""
    if isinstance(value, Mapping):
        result = {key: canonical_config(item) for key, item in value.items() if key not in _VOLATILE}
        dtype = result.pop("torch_dtype", None) or result.pop("dtype", None)
        return result | ({"dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {})
    if isinstance(value, list):
        return [canonical_config(item) for item in value]
    return value


def _sample_starts(size: int) -> list[int]:
    if size <= 3 * SAMPLE:
        return list(range(0, size, SAMPLE))
    return [0, (size - SAMPLE) // 2, size - SAMPLE]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
