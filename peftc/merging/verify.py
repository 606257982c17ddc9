"""Checking a merged directory against its certificate: every tensor that was touched by its sha256, every other one
against the base where that is still there, every file of an export by its sha256. An export with adapters has its
digests in `adapters.json`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peftc.diagnostics import fail
from peftc.merging.certificate import CERTIFICATE, file_digest
from peftc.ort.session import INDEX
from peftc.progress import Progress
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import Header, read_bytes

if TYPE_CHECKING:
    from rich.console import Console

_STEP = 1 << 24


@dataclass(slots=True)
class VerifyReport:
    """What was found equal, and what could not be checked."""

    directory: Path
    touched: int = 0
    untouched: int = 0
    files: int = 0
    unchecked: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "touched": self.touched,
            "untouched": self.untouched,
            "files": self.files,
            "unchecked": self.unchecked,
        }

    def render(self, console: Console) -> None:
        parts = [f"{self.touched} changed tensors", f"{self.untouched} tensors of the base", f"{self.files} files"]
        console.print(f"{self.directory} is as it was certified: {', '.join(parts)}")
        for reason in self.unchecked:
            console.print(f"note: {reason}")


def verify(directory: Path, base: str | Path | None, progress: Progress) -> VerifyReport:
    """Check `directory`. Raises `PeftcError`: E034 (no certificate), E031 (shards), E035 (another base), E054."""
    document = _read(directory / (INDEX if (directory / INDEX).is_file() else CERTIFICATE))
    report = VerifyReport(directory)
    if "tensors" in document:
        progress.step("check tensors")
        _check_tensors(ModelDir.open(directory), document, base, report, progress)
    for name, digest in document.get("files", {}).items():
        progress.step(f"check {name}")
        _check_file(directory / name, digest)
        report.files += 1
    return report


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail("E034", f"{file.parent} holds no {CERTIFICATE}", help="give a directory that `peftc merge` wrote")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        fail("E034", f"{file} cannot be read: {error}", help="merge again")
    if not isinstance(document, dict) or not ({"tensors", "files"} & document.keys()):
        fail("E034", f"{file} names no tensors to check", help="it is of an older peftc: merge again")
    return document


def _check_tensors(
    merged: ModelDir, document: dict[str, Any], base: str | Path | None, report: VerifyReport, progress: Progress
) -> None:
    touched = {entry["name"]: entry["sha256_after"] for entry in document["tensors"]}
    for name in touched:
        if name not in merged.tensors:
            _differs(merged.path, f"the changed tensor {name} is not there")
    others = [name for name in merged.tensors if name not in touched]
    if len(others) != document["untouched"]:
        _differs(merged.path, f"it holds {len(others)} tensors of the base, and {document['untouched']} were written")
    original = _base(document, base, report) if others else None
    total, done = sum(info.nbytes for _, info in merged.tensors.values()), 0
    for name, (header, info) in merged.tensors.items():
        if name in touched:
            if _digest(header, name) != touched[name]:
                _differs(header.path, f"{name} is not the tensor that was written")
            report.touched += 1
        elif original is not None:
            if name not in original.tensors or _digest(header, name) != _digest(original.tensors[name][0], name):
                _differs(header.path, f"{name} is not the base's")
            report.untouched += 1
        progress.update(done := done + info.nbytes, total)


def _base(document: dict[str, Any], base: str | Path | None, report: VerifyReport) -> ModelDir | None:
    place = Path(base or document["base_path"])
    if base is None and not place.exists():
        count = document["untouched"]
        report.unchecked.append(f"{count} tensors of the base were not checked: it is no longer at {place} (--base)")
        return None
    original = ModelDir.open(place)
    if original.fingerprint() != document["base"]:
        fail("E035", f"{place} is not the base that was merged", help="give the right one with --base")
    return original


def _digest(header: Header, name: str) -> str:
    digest, size = hashlib.sha256(), header.tensors[name].nbytes
    for start in range(0, size, _STEP):
        digest.update(read_bytes(header, name, start, _STEP))
    return digest.hexdigest()


def _check_file(path: Path, digest: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        _differs(path, error.strerror or str(error))
    if found != digest:
        _differs(path, "it is not the file that was written")


def _differs(place: Path, what: str) -> NoReturn:
    fail("E054", f"{place}: {what}", help="do not use it: merge again, or copy it again from where it was written")
