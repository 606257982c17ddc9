"""Traces on disk, so that the same model is traced once and not once a run.

A trace depends on the model class, its config and the inputs, and on the versions of torch, transformers and peftc.
All of that is in the name of its file, so another version traces anew by itself. A file starts with the sha256 of
what follows: one that was cut short or changed is told from a whole one, and made again.

    cache = TraceCache.of_environment()     # $PEFTC_CACHE, or traces/ under the user's cache directory
    key = key_of(model, inputs, flags)      # None: a class that may change without its version saying so
    exported = cache.read(key) or export()

The directory is the user's own, as the installed packages are: what is read from it is trusted as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from peftc.frontend.trace import InputSpec

VARIABLE = "PEFTC_CACHE"
"""The environment variable that names the directory; `off` keeps nothing."""

_FORMAT = 2
_MAGIC = b"peftc trace sha256 "
_LIMIT = 1 << 30
"""Bytes that the directory may hold; the traces used least recently go first."""

_VOLATILE = frozenset({"_name_or_path", "transformers_version", "name_or_path"})
"""Entries of a config that no trace depends on."""

_log = logging.getLogger(__name__)


def key_of(model: Any, inputs: Mapping[str, InputSpec], flags: Mapping[str, Any]) -> str | None:
    """A name for the trace of `model` with these inputs and flags, in the mode, dtype and versions of now.

    None for a class that is not transformers' own (its code may change under the same version) and for flags that
    have no plain text.
    """
    import torch
    import transformers

    import peftc

    cls = type(model)
    if not cls.__module__.startswith("transformers."):
        return None
    described = {
        "format": _FORMAT,
        "versions": [peftc.__version__, torch.__version__, transformers.__version__],
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "config": _plain(model.config),
        "kernels": [model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)],
        "dtypes": sorted({str(value.dtype) for value in (*model.parameters(), *model.buffers())}),
        "training": model.training,
        "inputs": [[name, str(spec.dtype), list(spec.sizes)] for name, spec in inputs.items()],
        "flags": sorted(flags.items()),
    }
    try:
        text = json.dumps(described, sort_keys=True)
    except TypeError:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(config: Any) -> dict[str, Any]:
    return {name: value for name, value in json.loads(config.to_json_string(use_diff=False)).items()
            if name not in _VOLATILE}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TraceCache:
    """A directory of traces; `directory` None keeps nothing."""

    directory: Path | None
    limit: int = _LIMIT

    @classmethod
    def of_environment(cls) -> TraceCache:
        """As `$PEFTC_CACHE` says; without it, `peftc/traces` under `$XDG_CACHE_HOME` or `~/.cache`."""
        stated = os.environ.get(VARIABLE, "")
        if stated == "off":
            return cls(None)
        if stated:
            return cls(Path(stated))
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # no home directory can be told
            return cls(None)
        return cls(home / "peftc" / "traces")

    def read(self, key: str | None) -> ExportedProgram | None:
        """The trace under `key`; None when there is none, or none that is whole."""
        if key is None or self.directory is None:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        header, _, body = content.partition(b"\n")
        if header != _header(body):
            _log.info("%s is damaged and is made again", path)
            return None
        return _load(body)

    def write(self, key: str | None, exported: ExportedProgram) -> None:
        """Keep the trace under `key`. A directory that cannot be written to is no error: nothing is kept then."""
        if key is None or self.directory is None or (body := _dump(exported)) is None:
            return
        path = self._path(key)
        fresh = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_bytes(_header(body) + b"\n" + body)
            fresh.replace(path)
            self._prune(path)
        except OSError as error:
            _log.info("no trace is kept in %s: %s", self.directory, error)
            with contextlib.suppress(OSError):
                fresh.unlink()

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}.trace"

    def _prune(self, newest: Path) -> None:
        """Remove the traces used least recently until the directory is within its limit; `newest` stays."""
        found = []
        for path in newest.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process prunes too
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _header(body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(body).hexdigest().encode()


def _dump(exported: ExportedProgram) -> bytes | None:
    """The bytes of a trace; None where torch has no way to write it."""
    import torch

    held = io.BytesIO()
    try:
        torch.export.save(exported, held)
    except _UNWRITABLE as error:
        _log.info("this trace cannot be kept: %s", error)
        return None
    return held.getvalue()


def _load(body: bytes) -> ExportedProgram | None:
    import torch

    try:
        return torch.export.load(io.BytesIO(body))
    except _UNWRITABLE as error:  # whole, and written by these versions, yet unreadable: a limit of torch.export
        _log.info("a kept trace cannot be read: %s", error)
        return None


_UNWRITABLE = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, AssertionError, NotImplementedError)
"""What torch.export raises for what it cannot write or read (an output class that it does not know, an op, ...)."""
