"""`peftc merge DIR... --export onnx --adapters`: delta directories of one base as one model and a file for each.

    model.onnx, model.onnx.data     the base, with every delta an optional input
    NAME.onnx_adapter               the values of one delta directory; NAME is the directory's
    adapters.json                   base, adapters, what was compared, sha256 of the files above
    config.json, tokenizer files

The model is run in onnxruntime without an adapter and with each before the directory appears, against torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import peftc
from peftc.backends import onnx
from peftc.diagnostics import fail
from peftc.hotswap.base import BaseTensors
from peftc.hotswap.compare import compare_session
from peftc.hotswap.joint import Group, Joint, joint_program
from peftc.hotswap.report import AdapterReport, AdaptersReport
from peftc.hotswap.structure import Structure, numbers_of, structure_of
from peftc.hotswap.write import write_model
from peftc.merging.adapted import Adapted
from peftc.merging.certificate import delta_digests, file_digest
from peftc.merging.certify import Comparison, refuse_failed
from peftc.ort.adapters import SUFFIX, model_number, write_adapter
from peftc.ort.session import INDEX, NUMBER
from peftc.pipeline import analyse
from peftc.planning.plan import make_plan
from peftc.progress import Progress
from peftc.runtime.delta_dir import check_names
from peftc.store.atomic import atomic_directory, check_target

if TYPE_CHECKING:
    from peftc.ir.program import Program
    from peftc.runtime.unfolded import Unfolded


@dataclass(frozen=True, slots=True)
class _Member:
    """A delta directory, with what its graph is and where its tensors are."""

    name: str
    adapted: Adapted
    structure: Structure
    numbers: tuple[tuple[float, ...], ...]
    read: Unfolded
    trained: tuple[str, ...]


def export_adapters(
    directories: Sequence[Path],
    out: Path,
    *,
    base: str | Path | None,
    progress: Progress,
    opset: int = onnx.DEFAULT_OPSET,
    texts: Sequence[str] = (),
) -> AdaptersReport:
    """Write the model and an adapter for each directory. Raises `PeftcError` E030 to E043, E090, E093."""
    progress.step("read the deltas")
    opened = _opened(directories, base)
    check_target(out, replace=True)
    first = next(iter(opened.values()))
    progress.step(f"trace {first.base_class.__name__}")
    specs = onnx.export_inputs(first.skeleton, onnx.tokenizer_inputs(first.base))
    program = analyse(first.skeleton, specs)
    members = [_member(name, adapted, program) for name, adapted in opened.items()]
    groups = _grouped(members)
    trained = tuple(dict.fromkeys(name for member in members for name in member.trained))
    joint = joint_program(program, groups, trained, first.fresh)
    number = model_number(_identity(first))
    with atomic_directory(out, replace=True) as fresh:
        progress.step("export ONNX")
        metadata = {NUMBER: str(number), "peftc.base": first.base.fingerprint()}
        tensors = BaseTensors(first)
        files = write_model(fresh, joint, specs, tensors, metadata=metadata, opset=opset, progress=progress.update)
        for member in members:
            group = next(group for group in groups if member.name in group.members)
            write_adapter(fresh / f"{member.name}{SUFFIX}", _values(member, group, joint), number)
        first.base.copy_support_files(fresh)
        first.skeleton.config.save_pretrained(fresh)
        progress.step("compare onnxruntime with torch")
        compared = compare_session(fresh, opened, specs, texts)
        refuse_failed(comparison for comparisons in compared.values() for comparison in comparisons)
        report = _report(out, fresh, members, groups, joint, files, compared)
        (fresh / INDEX).write_text(json.dumps(_index(first, number, report), indent=2) + "\n", encoding="utf-8")
    return report


def _opened(directories: Sequence[Path], base: str | Path | None) -> dict[str, Adapted]:
    """The delta directories by the names of their adapters, all of one base and one head."""
    opened: dict[str, Adapted] = {}
    for directory in directories:
        name = directory.resolve().name
        if name in opened:
            fail("E093", f"two of the directories are called {name}, which names their adapters", help="rename one")
        adapted = opened[name] = Adapted.open(directory, base)
        delta_digests(adapted.delta)  # refuses what is no number
        first = next(iter(opened.values()))
        if _identity(adapted) != _identity(first):
            what = "base" if adapted.base.fingerprint() != first.base.fingerprint() else "head"
            message = f"{first.delta.path} and {directory} are deltas of another {what} each"
            fail("E093", message, help="one model serves deltas of one base with one head; export them apart")
    return opened


def _identity(adapted: Adapted) -> str:
    """What adapters of one model have in common."""
    reference = adapted.delta.manifest["base"]
    parts = (adapted.base.fingerprint(), adapted.base_class.__name__, reference["num_labels"], adapted.dtype)
    return "\n".join(map(str, parts))


def _member(name: str, adapted: Adapted, program: Program) -> _Member:
    rule, fresh = adapted.delta.rule, adapted.fresh
    plan = make_plan(rule, program, fresh=fresh)
    shapes = {p.name: p.shape for p in plan.parameters.values()}
    trained = {n: tuple(adapted.skeleton.model.get_parameter(n).shape) for n in plan.trained}
    check_names(adapted.delta.path, adapted.delta.header.tensors, shapes, trained)
    structure, numbers = structure_of(rule, program, fresh), numbers_of(rule, program, fresh)
    return _Member(name, adapted, structure, numbers, adapted.tensors(plan), plan.trained)


def _grouped(members: Sequence[_Member]) -> list[Group]:
    """The members by structure; a group is called by the first rule that has it."""
    by_signature: dict[Any, list[_Member]] = {}
    for member in members:
        by_signature.setdefault(member.structure.signature, []).append(member)
    groups: dict[str, Group] = {}
    for alike in by_signature.values():
        word = "".join(c if c.isalnum() else "_" for c in alike[0].adapted.delta.rule.name)
        name = next(n for i in range(1, len(groups) + 2) if (n := word if i == 1 else f"{word}_{i}") not in groups)
        groups[name] = Group(name, alike[0].structure, tuple(member.name for member in alike))
    return list(groups.values())


def _values(member: _Member, group: Group, joint: Joint) -> dict[str, Any]:
    """The tensors of an adapter by the names of inputs."""
    values: dict[str, torch.Tensor] = {}
    for name in member.structure.shapes:
        spec = joint.inputs[group.renamed(name)]
        values[spec.name] = member.read(name).to(spec.dtype)
    for name, (entry, index) in joint.numbers[group.name].items():
        values[name] = torch.tensor([member.numbers[entry][index]], dtype=joint.inputs[name].dtype)
    for name in member.trained:
        values[name] = member.read(name).to(joint.inputs[name].dtype)
    return {name: value.detach().contiguous().numpy() for name, value in values.items()}


def _report(
    out: Path,
    fresh: Path,
    members: Sequence[_Member],
    groups: Sequence[Group],
    joint: Joint,
    files: onnx.OnnxFiles,
    compared: Mapping[str, list[Comparison]],
) -> AdaptersReport:
    adapters = []
    for member in members:
        group = next(group for group in groups if member.name in group.members)
        file = fresh / f"{member.name}{SUFFIX}"
        inputs = len(member.structure.shapes) + len(joint.numbers[group.name]) + len(member.trained)
        rule = member.adapted.delta.rule
        adapters.append(
            AdapterReport(
                member.name,
                rule.name,
                group.name,
                inputs,
                file.stat().st_size,
                compared[member.name],
            )
        )
    digests = {path.name: file_digest(path) for path in sorted(fresh.glob(f"{onnx.MODEL}*"))}
    digests |= {name: file_digest(fresh / name) for name in (f"{a.name}{SUFFIX}" for a in adapters)}
    return AdaptersReport(out, files, len(joint.inputs), tuple(adapters), compared[""], digests)


def _index(first: Adapted, number: int, report: AdaptersReport) -> dict[str, Any]:
    return {
        "peftc": peftc.__version__,
        "base": first.base.fingerprint(),
        "base_path": str(first.base.path.resolve()),
        "model_number": number,
        **report.to_json(),
    }
