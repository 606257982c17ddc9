"""Merging: a delta directory and its base become a plain checkpoint, an ONNX model, or both, with a certificate.

Everything is written into a sibling of the destination and compared there with the unfolded model; the destination
appears when it is whole and right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils import _pytree as pytree

from peftc.backends import hf, onnx
from peftc.certify import Comparison, Inputs, Run, compare, random_batches, refuse_failed, text_batches
from peftc.diagnostics import fail
from peftc.fold.constants import evaluate_constants
from peftc.fold.decide import Decision
from peftc.fold.state import FoldedState
from peftc.frontend.trace import InputSpec, Skeleton, build_skeleton, default_inputs
from peftc.passes.fold import Fold
from peftc.pipeline import analyse, rewrite
from peftc.progress import Progress
from peftc.reports import MergeReport
from peftc.runtime.api import load, new_parameters
from peftc.runtime.delta_dir import DeltaDir
from peftc.runtime.state import state_of
from peftc.store.atomic import atomic_directory, check_target
from peftc.store.model_dir import ModelDir

if TYPE_CHECKING:
    from peftc.ir.program import Program

CERTIFICATE = "certificate.json"

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Largest difference of outputs of order 1 that a certificate lets pass, by the dtype compared in."""


@dataclass(slots=True)
class _Work:
    """What both backends need."""

    delta: DeltaDir
    source: ModelDir
    model: Any
    skeleton: Skeleton
    progress: Progress
    comparisons: list[Comparison] = field(default_factory=list)
    read: dict[str, str] = field(default_factory=dict)
    """sha256 of every delta tensor that was read."""

    def tensor(self, name: str) -> torch.Tensor:
        """An unfolded tensor of the adapted model, by state-dict name."""
        return state_of(self.model)[name].detach()

    def fold(self, specs: Mapping[str, InputSpec]) -> tuple[Program, Fold]:
        program = analyse(self.skeleton, specs)
        rewrite(program, self.delta.rule, fresh=new_parameters(self.source, self.skeleton))
        fold = Fold()
        fold.apply(program)
        return program, fold

    def unfolded(self, specs: Mapping[str, InputSpec]) -> Run:
        def run(inputs: Inputs) -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return _tensors(self.model(**{name: inputs[name] for name in specs}))

        return run

    def batches(self, specs: Mapping[str, InputSpec]) -> list[tuple[str, Inputs]]:
        vocabulary = getattr(self.skeleton.config.get_text_config(), "vocab_size", 100)
        return [*random_batches(specs, vocabulary), *text_batches(self.source.path, specs)]


def merge(directory: Path, out: Path, *, export: set[str], base: str | Path | None, progress: Progress) -> MergeReport:
    """Fold and write; see `peftc.driver.merge`. Raises `PeftcError` E034 to E040, E042, E043."""
    progress.step("read the delta")
    delta = DeltaDir.open(directory)
    source = ModelDir.open(delta.base_dir(base))
    for place, what in ((directory, "the delta directory"), (source.path, "the base model")):
        if out.resolve() == place.resolve():
            fail("E036", f"{out} is {what} itself", help="choose another directory with -o")
    check_target(out, replace=True)
    model: Any = load(directory, base)
    skeleton = build_skeleton(model.surgery.base_class, _plain_config(model), model.dtype)
    work = _Work(delta, source, model, skeleton, progress)
    work.read = {name: _sha256(_finite(delta, name)) for name in delta.header.tensors}
    progress.step("fold")
    program, fold = work.fold(default_inputs(skeleton.model))
    if "hf" in export:
        hf.refuse_kept(fold.decisions)
    with atomic_directory(out, replace=True) as fresh:
        report = MergeReport(out, fold.decisions, model.surgery.plan)
        if "hf" in export:
            report.checkpoint = _write_checkpoint(work, fresh, program, fold)
        if "onnx" in export:
            report.onnx = _write_onnx(work, fresh, report)
        refuse_failed(work.comparisons)
        report.comparisons = work.comparisons
        certificate = _certificate(work, report)
        (fresh / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    return report


def _plain_config(model: Any) -> Any:
    """The base's config, without what adapting changed in it."""
    import copy

    config = copy.deepcopy(model.config)
    config.architectures = [model.surgery.base_class.__name__]
    return config


def _write_checkpoint(work: _Work, fresh: Path, program: Program, fold: Fold) -> hf.Checkpoint:
    work.progress.step("write checkpoint")
    folded = FoldedState(work.tensor, fold.updates)
    written = hf.emit(
        fresh,
        source=work.source,
        skeleton=work.skeleton,
        program=program,
        decisions=fold.decisions,
        folded=folded,
        trained=work.model.surgery.plan.trained,
        progress=work.progress.update,
    )
    work.progress.step("compare with the unfolded model")
    cls = work.model.surgery.base_class
    dtype = work.model.dtype
    with _quiet():
        plain = cls.from_pretrained(fresh, dtype=dtype).eval()
    specs = default_inputs(work.skeleton.model)
    _compare_plain(work, plain, specs, dtype)
    if dtype == torch.float32:
        work.model.double()
        _compare_plain(work, plain.double(), _in_float64(specs), torch.float64, tolerance=_TOLERANCE[torch.float32])
        work.model.float()
    return written


def _in_float64(specs: Mapping[str, InputSpec]) -> dict[str, InputSpec]:
    return {n: InputSpec(torch.float64 if s.dtype.is_floating_point else s.dtype, s.sizes) for n, s in specs.items()}


def _compare_plain(
    work: _Work, plain: Any, specs: Mapping[str, InputSpec], dtype: torch.dtype, tolerance: float | None = None
) -> None:
    def folded(inputs: Inputs) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            extra = {"use_cache": False} if hasattr(plain.config, "use_cache") else {}
            return _tensors(plain(**{name: inputs[name] for name in specs}, **extra))

    label = str(dtype).removeprefix("torch.")
    work.comparisons += compare(
        "the merged checkpoint", work.unfolded(specs), folded, work.batches(specs),
        tolerance=tolerance or _TOLERANCE[dtype], dtype=label,
    )  # fmt: skip


def _write_onnx(work: _Work, fresh: Path, report: MergeReport) -> onnx.OnnxFiles:
    work.progress.step("export ONNX")
    specs = onnx.export_inputs(work.skeleton, _tokenizer_inputs(work.source))
    program, fold = work.fold(specs)
    state = folded_program_state(work, program, fold)
    files = onnx.emit(fresh, program, specs, state)
    if not (fresh / "config.json").exists():
        work.source.copy_support_files(fresh)
        work.skeleton.config.save_pretrained(fresh)
    work.progress.step("compare onnxruntime with torch")
    work.comparisons += compare(
        "model.onnx in onnxruntime", work.unfolded(specs), _session(files), work.batches(specs),
        tolerance=_TOLERANCE[work.model.dtype], dtype=str(work.model.dtype).removeprefix("torch."),
    )  # fmt: skip
    report.exported = {decision.insertion.delta: decision.result for decision in fold.decisions}
    return files


class Tensors(Protocol):
    """Where the unfolded model's tensors are read from."""

    def tensor(self, name: str) -> torch.Tensor: ...


def folded_program_state(work: Tensors, program: Program, fold: Fold) -> dict[str, torch.Tensor]:
    """`folded_state`, and the shapes of the program's nodes in step with it, as an export needs them."""
    values = folded_state(work, program, fold)
    for node, binding in program.bindings.items():
        if binding.kind == "parameter":
            program.resize(node, values[binding.name])
    program.propagate()
    return values


def folded_state(work: Tensors, program: Program, fold: Fold) -> dict[str, torch.Tensor]:
    """Take folded deltas out of `program` and return every tensor it then needs: folded, kept and constant ones."""
    folded = FoldedState(work.tensor, fold.updates)
    values = {name: folded(name) for name in folded.touched}
    fold.remove(program)
    remaining = [d.insertion for d in fold.decisions if d.result in ("constant", "kept")]
    values.update(evaluate_constants(program, remaining, work.tensor))
    program.drop_unused_deltas()
    for binding in program.bindings.values():
        if binding.kind in ("parameter", "buffer") and binding.name not in values:
            values[binding.name] = work.tensor(binding.name)
    return values


def _session(files: onnx.OnnxFiles) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(files.path), options, providers=["CPUExecutionProvider"])
    wanted = {argument.name for argument in session.get_inputs()}

    def run(inputs: Inputs) -> Sequence[torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]

    return run


def _tokenizer_inputs(source: ModelDir) -> tuple[str, ...]:
    if not source.tokenizer_files or not (source.path / "tokenizer_config.json").exists():
        return ()
    from transformers import AutoTokenizer

    try:
        return tuple(AutoTokenizer.from_pretrained(source.path).model_input_names)
    except (OSError, ValueError):
        return ()


def _tensors(result: Any) -> list[torch.Tensor]:
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _quiet() -> Any:
    from peftc.frontend.trace import quiet

    return quiet()


def _finite(delta: DeltaDir, name: str) -> torch.Tensor:
    """A delta tensor, read. Raises `PeftcError` E042 when it holds NaN or infinity."""
    tensor = delta.read(name)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        message = f"{delta.header.path}: {name} holds NaN or infinity"
        fail("E042", message, help="the training that saved it diverged; nothing was written")
    return tensor


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _certificate(work: _Work, report: MergeReport) -> dict[str, Any]:
    return {
        "peftc": __import__("peftc").__version__,
        "rule": work.delta.rule.name,
        "base": work.source.fingerprint(),
        "delta_sha256": work.read,
        **report.to_json(),
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
