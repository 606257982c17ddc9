"""The delta directory: what `apply` writes and training saves; small, never the base weights.

    peftc.json             format version, base reference and fingerprint, head, counts, sites
    rule.yaml              the rule with its hyperparameters resolved
    delta.safetensors      delta tensors, and the base tensors that the rule trains
    config.json, tokenizer files

Written to a sibling directory and renamed into place, so a killed run leaves the old directory or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import Diagnostic, PeftcError, fail
from peftc.store.atomic import atomic_directory
from peftc.store.safetensors_io import Header, TensorInfo, TensorSpec, read_header, read_tensor, write

if TYPE_CHECKING:
    import torch

    from peftc.lang.rule import Rule
    from peftc.planning.plan import Plan

FORMAT = 1
_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
MANIFEST, RULE, TENSORS = "peftc.json", "rule.yaml", "delta.safetensors"

_BASE_KEYS: dict[str, Any] = {
    "path": str, "parts": dict, "head": (str, type(None)), "num_labels": (int, type(None)), "seed": int,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeltaDir:
    """An opened delta directory; tensors are read one by one on demand."""

    path: Path
    manifest: dict[str, Any]
    rule: Rule
    header: Header

    @staticmethod
    def open(path: str | Path) -> DeltaDir:
        """Read and check a delta directory. Raises `PeftcError` E034, E031, or what the rule says."""
        from peftc.lang.loader import parse_rule

        path = Path(path)
        if not (path / MANIFEST).is_file():
            what = "does not exist" if not path.exists() else f"holds no {MANIFEST}"
            fail("E034", f"{path} is not a delta directory: it {what}", help="`peftc apply RULE MODEL_DIR` makes one")
        manifest = _read_manifest(path / MANIFEST)
        rule_file = path / RULE
        if not rule_file.is_file():
            fail("E034", f"{path} holds no {RULE}", help="the directory is not whole; apply the rule again")
        try:
            rule = parse_rule(rule_file.read_text(encoding="utf-8"), str(rule_file))
        except (OSError, UnicodeDecodeError) as error:
            fail("E034", f"{rule_file} cannot be read: {error}", help="apply the rule again")
        except PeftcError as error:
            raise PeftcError([*error.diagnostics, *_missing_packages(manifest)]) from error
        return DeltaDir(path, manifest, rule, read_header(path / TENSORS))

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.header, name)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in self.header.tensors}

    def base_dir(self, override: str | Path | None = None) -> Path:
        """Where the base model is: `override`, or the place `apply` found it (relative to this directory or not)."""
        if override is not None:
            return Path(override)
        recorded = Path(self.manifest["base"]["path"])
        beside = (self.path / self.manifest["base"].get("relative", "")).resolve()
        if not recorded.exists() and (beside / "config.json").exists():
            return beside
        if not recorded.exists():
            fail("E030", f"the base model is no longer at {recorded}", help="say where it is with --base MODEL_DIR")
        return recorded


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail("E034", f"{file} cannot be read: {error}", help="apply the rule again")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        fail("E034", f"{file} is of another format than {FORMAT}", help="use the peftc that wrote it")
    base = manifest.get("base")
    for key, kinds in _BASE_KEYS.items():
        if not isinstance(base, dict) or not isinstance(base.get(key), kinds):
            fail("E034", f"{file}: `base.{key}` is missing or of the wrong type", help="apply the rule again")
    return manifest


def _missing_packages(manifest: Mapping[str, Any]) -> list[Diagnostic]:
    """An E045 for each package that the rule's ops were from and that is not installed."""
    from peftc.lang.complaints import shown
    from peftc.lang.extensions import OPS_GROUP, entry_points, problem

    recorded = manifest.get("ops_from")
    names = [origin for origin in recorded if isinstance(origin, str)] if isinstance(recorded, list) else []
    installed = {origin.partition(" ")[0] for _, origin in entry_points(OPS_GROUP)}
    absent = [origin for origin in names if origin.partition(" ")[0] not in installed]
    reason = "the rule calls ops of it, and it is not installed"
    return [problem(shown(origin), reason, "install it if you trust it: ops are code") for origin in absent]


def refuse_trained(target: Path) -> None:
    """Refuse to lose training: `target` holds what `save_pretrained` wrote. Raises `PeftcError` E036."""
    if (target / MANIFEST).is_file() and _read_manifest(target / MANIFEST).get("saved"):
        message = f"{target} holds deltas that were saved from a model, and applying again would lose them"
        fail("E036", message, help="give another place with -o, or remove it yourself")


def check_names(
    path: Path,
    stored: Mapping[str, TensorInfo],
    deltas: Mapping[str, tuple[int, ...]],
    trained: Mapping[str, tuple[int, ...]],
) -> None:
    """Every delta is stored as floats of its shape, and nothing else is but base tensors the rule trains (those are
    there once they have been trained). Raises `PeftcError` E040.
    """
    wanted = {**deltas, **trained}
    missing = [name for name in deltas if name not in stored]
    extra = [name for name in stored if name not in wanted]
    found = {name: stored[name] for name in wanted if name in stored}
    wrong = [name for name, info in found.items() if info.shape != tuple(wanted[name])]
    whole = [name for name, info in found.items() if info.dtype not in _FLOATS]
    problems = [("is missing", missing), ("belongs to no delta of the rule", extra)]
    if wrong:
        shapes = f"is {list(found[wrong[0]].shape)}, and the rule says {list(wanted[wrong[0]])}"
        problems.append((shapes, wrong))
    problems += [(f"is {found[name].dtype}, not a float", whole) for name in whole[:1]]
    for what, names in problems:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            message = f"{path / TENSORS}: {names[0]}{more} {what}"
            fail("E040", message, help=f"{RULE} and {TENSORS} must come from one and the same save")


def write_directory(
    target: Path,
    *,
    plan: Plan,
    base: Mapping[str, Any],
    entries: list[TensorSpec],
    produce: Callable[[str], torch.Tensor],
    support: Callable[[Path], None],
    replace: bool = True,
    progress: Any = None,
) -> None:
    """Write a delta directory in one move. `support` copies config and tokenizer into it."""
    with atomic_directory(target, replace=replace) as fresh:
        write_files(
            fresh, target, plan=plan, base=base, entries=entries, produce=produce, support=support, progress=progress
        )


def write_files(
    fresh: Path,
    target: Path,
    *,
    plan: Plan,
    base: Mapping[str, Any],
    entries: list[TensorSpec],
    produce: Callable[[str], torch.Tensor],
    support: Callable[[Path], None],
    saved: bool = False,
    progress: Any = None,
) -> None:
    """Write the files of a delta directory into `fresh`, which will be, or go into, `target`.

    `saved` marks what comes from a model, and may be trained.
    """
    support(fresh)
    (fresh / RULE).write_text(plan.rule.text, encoding="utf-8")
    write(fresh / TENSORS, entries, produce, metadata={"format": "pt"}, progress=progress)
    relative = os.path.relpath(base["path"], target.resolve())
    origin = {**base, "relative": relative}
    manifest = {"format": FORMAT, "base": origin, "saved": saved, **plan_summary(plan)}
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: counts, and each delta's sites with their parameters."""
    from peftc.lang.foreign import op_packages

    deltas = []
    for delta in plan.rule.deltas:
        edits = [edit for edit in plan.edits if edit.delta is delta]
        sites = [{"site": e.site.kind, "path": e.site.path, "tap": e.tap} for e in edits]
        deltas.append({"name": delta.name, "form": delta.form.name, "sites": sites})
    packages = op_packages(plan.rule.text)
    return {
        "rule": plan.rule.name,
        "counts": {
            "trained": plan.trained_count,
            "stored": plan.stored_count,
            "base": plan.base_count,
            "percent": round(plan.percent, 4),
        },
        **({"budget": asdict(plan.budget)} if plan.budget is not None else {}),
        "trained_base": list(plan.trained),
        "deltas": deltas,
        "lr": plan.rates,
        **({"ops_from": packages} if packages else {}),
    }
