"""The certificate of a merge: what was read, what changed and by how much, what was compared; and its later check.

certificate.json
  base, delta_sha256      the base's fingerprint, sha256 of every delta tensor
  tensors                 of each stored tensor that is not the base's: sha256 before and after, norm of the change,
                          what rounding to the stored dtype cost
  untouched               how many tensors were copied byte for byte
  comparisons             outputs against the unfolded model
  decisions               what became of every delta at every site
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import fail
from peftc.store.safetensors_io import as_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from peftc.backends.hf import Checkpoint
    from peftc.fold.decide import Decision
    from peftc.merging.adapted import Adapted
    from peftc.planning.plan import Plan
    from peftc.reports import MergeReport
    from peftc.runtime.delta_dir import DeltaDir
    from peftc.runtime.unfolded import Unfolded

CERTIFICATE = "certificate.json"
_STEP = 1 << 24


def delta_digests(delta: DeltaDir) -> dict[str, str]:
    """sha256 of every delta tensor. Raises `PeftcError` E042 when one holds NaN or infinity."""
    import torch

    digests = {}
    for name in delta.header.tensors:
        tensor = delta.read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            message = f"{delta.header.path}: {name} holds NaN or infinity"
            fail("E042", message, help="the training that saved it diverged; nothing was written")
        digests[name] = hashlib.sha256(as_bytes(tensor)).hexdigest()
    return digests


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces. Raises `OSError`."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_STEP):
            digest.update(block)
    return digest.hexdigest()


def refuse_unread(delta: DeltaDir, read: Unfolded, plan: Plan) -> None:
    """Refuse a merge in which a delta tensor went nowhere. Raises `PeftcError` E049."""
    lost = [name for name in delta.header.tensors if name not in read.read]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        fail("E049", f"{lost[0]}{more} of {delta.header.path} changed no tensor of the merged model")


def refuse_nothing(written: Checkpoint, *, allowed: bool) -> None:
    """Refuse a merge that left every tensor as it was. Raises `PeftcError` E049."""
    if allowed or any(change.changed for change in written.changes):
        return
    rounded = sum(change.change > 0 for change in written.changes)
    if rounded:
        dtype = written.changes[0].dtype
        fail(
            "E049",
            f"the merge changes nothing: the changes of all {rounded} tensors are lost in rounding to {dtype}",
            help="train further, or merge into a base that is stored in a wider dtype",
        )
    fail(
        "E049",
        f"the merge changes nothing: its {len(written.changes)} tensors are the base's, for the deltas are untrained",
        help="save the trained model into this directory first, or pass --allow-unchanged to merge it all the same",
    )


def certificate(adapted: Adapted, report: MergeReport, digests: dict[str, str]) -> dict[str, Any]:
    """The document. `digests` are the sha256 of the delta tensors that were read."""
    return {
        "peftc": __import__("peftc").__version__,
        "rule": adapted.delta.rule.name,
        "base": adapted.base.fingerprint(),
        "base_path": str(adapted.base.path.resolve()),
        "delta_sha256": digests,
        **report.to_json(),
        **({"files": report.files} if report.files else {}),
        "decisions": [_decision_json(decision) for decision in report.decisions],
    }


def _decision_json(decision: Decision) -> dict[str, str]:
    insertion = decision.insertion
    return {
        "delta": insertion.delta,
        "site": insertion.site.path,
        "tap": insertion.tap,
        "result": decision.result,
        "node": decision.node,
        "reason": decision.reason,
    }
