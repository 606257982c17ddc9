"""A rule tried on one traced model with random weights: identity at the start, gradients, onnxruntime."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peftc.frontend.trace import SAMPLES, InputSpec, Skeleton
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.lang.loader import load_rule
from peftc.merging.certify import SHAPES, random_batches
from peftc.passes.set_mode import draws
from peftc.pipeline import rewrite
from peftc.runtime.executor import Executor
from peftc.runtime.init import Initializer
from peftc.survey.weights import random_state

TOLERANCE = 2e-4
"""Of the largest output: float32 through two layers, with kernels that may differ."""
SEED = 3
VOCABULARY = 19
"""Ids below every special token of a small config."""


class TrialError(Exception):
    """Two runs that should agree do not, or a delta gets no gradient."""


class Trial:
    """A located program with weights, inputs, and what it answers without a delta.

    Inputs are of two sizes, where the graph is for every size; `held` says which axes it holds fixed.
    """

    def __init__(self, skeleton: Skeleton, specs: Mapping[str, InputSpec], program: Program) -> None:
        self.skeleton, self.specs, self.program = skeleton, specs, program
        self.state = random_state(skeleton, program)
        self.shapes, self.held = fitting_shapes(program)
        self.batches = [dict(tensors) for _, tensors in random_batches(specs, VOCABULARY, shapes=self.shapes)]
        self.base = [self._run(program, self.state, inputs) for inputs in self.batches]
        if not any(tensor.numel() and tensor.isfinite().all() for tensor in self.base[0]):
            raise TrialError("the base answers no finite number")

    def steps(self, rule: str, hyper: Mapping[str, object], *, gradients: bool = True, onnx: bool) -> Iterator[str]:
        """How far the rule gets, step by step; raises `TrialError` or `PeftcError` at the first that fails."""
        program = copied(self.program)
        plan = rewrite(program, load_rule(rule, hyper))
        yield "applies"
        start = Initializer(plan.parameters, 0, self.state.__getitem__, saved=_nothing_saved)
        deltas = {name: start(name) for name in plan.parameters}
        if rule != "mam":  # a prefix is no identity at its start
            self._same({**self.state, **deltas}, program)
        else:
            self._finite({**self.state, **deltas}, program)
        yield "identity"
        noise = torch.Generator().manual_seed(2)
        filled = {n: torch.randn(v.shape, generator=noise) * 0.1 for n, v in deltas.items()}
        if gradients:
            self._learns(program, filled, {n for n, p in plan.parameters.items() if not p.frozen})
            yield "learns"
        if onnx:
            self._onnx(program, {**self.state, **filled})
            yield "onnx"

    def drawn(self) -> str:
        """The op that draws in the evaluation graph; empty where none does."""
        executor = Executor(self.program, training=False, device=torch.device("cpu"))
        return next((str(node.target) for node in draws(executor.module.graph)), "")

    def _run(
        self, program: Program, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> list[Any]:
        torch.manual_seed(SEED)  # what a model draws in its forward is drawn alike on both sides
        with torch.no_grad():
            values = Executor(program, training=False, device=torch.device("cpu")).flat(state, inputs)
        return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def _same(self, state: Mapping[str, torch.Tensor], program: Program) -> None:
        for inputs, expected in zip(self.batches, self.base, strict=True):
            _compare(self._run(program, state, inputs), expected, "at its start the model differs from its base")

    def _finite(self, state: Mapping[str, torch.Tensor], program: Program) -> None:
        for inputs, expected in zip(self.batches, self.base, strict=True):
            found = self._run(program, state, inputs)
            if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in expected]:
                raise TrialError("the outputs have other shapes than the base's")

    def _learns(self, program: Program, deltas: dict[str, torch.Tensor], trained: set[str]) -> None:
        leaves = {name: value.requires_grad_(name in trained) for name, value in deltas.items()}
        missed = self._without_gradient(program, leaves, sorted(trained), self.batches[0])
        if missed and "input_ids" in self.batches[0]:
            missed = self._without_gradient(program, leaves, missed, self._marked(self.batches[0]))
        for value in leaves.values():
            value.requires_grad_(False)
        if missed:
            raise TrialError(f"{len(missed)} of {len(trained)} deltas get no gradient, such as {missed[0]}")

    def _without_gradient(
        self, program: Program, leaves: Mapping[str, torch.Tensor], names: list[str], inputs: Mapping[str, torch.Tensor]
    ) -> list[str]:
        torch.manual_seed(SEED)
        executor = Executor(program, training=False, device=torch.device("cpu"))
        values = executor.flat({**self.state, **leaves}, inputs)
        outputs = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.requires_grad]
        if not outputs:
            raise TrialError("no output depends on a delta")
        noise = torch.Generator().manual_seed(5)
        loss = sum((v * torch.randn(v.shape, generator=noise)).nan_to_num().sum() for v in outputs)
        assert isinstance(loss, torch.Tensor)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
        return [n for n, g in zip(names, gradients, strict=True) if g is None or not g.abs().max() > 0]

    def _marked(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs with the tokens in them that stand for a sound or an image: layers of their own read those."""
        ids = inputs["input_ids"].clone()
        for place, marker in enumerate(markers(self.skeleton.config)):
            ids[:, 2 + place :: 5] = marker
        return {**inputs, "input_ids": ids}

    def _onnx(self, program: Program, state: Mapping[str, torch.Tensor]) -> None:
        import onnxruntime

        from peftc.backends.onnx import MODEL, emit
        from peftc.backends.onnx_weights import HeldWeights

        if drawn := self.drawn():
            raise TrialError(f"draws random numbers in evaluation too ({drawn}): nothing in onnxruntime can equal it")
        expected = [self._run(program, state, inputs) for inputs in self.batches]
        with tempfile.TemporaryDirectory() as folder:
            emit(Path(folder), copied(program), self.specs, HeldWeights(state))
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(Path(folder) / MODEL, options, providers=["CPUExecutionProvider"])
            for inputs, answer in zip(self.batches, expected, strict=True):
                names = {entry.name for entry in session.get_inputs()}
                found: list[Any] = list(session.run(None, {n: v.numpy() for n, v in inputs.items() if n in names}))
                tensors = [torch.from_numpy(v) for v in found if v.dtype.kind == "f"]
                _compare(tensors, answer, "onnxruntime answers otherwise")


def markers(config: Any) -> list[int]:
    """The ids of tokens that stand for something else than text, as a config names them."""
    found = {v for n, v in vars(config).items() if re.fullmatch(r"(image|audio|video)_token_(id|index)", n)}
    return sorted(v for v in found if isinstance(v, int))


def fitting_shapes(program: Program) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Sizes of two calls that the graph holds for, and the axes that it fixes, at the size of its sample."""
    held = dict(program.fixed)
    guards: Any = program.guards
    for sizes in SHAPES[1:]:
        if guards is None:
            break
        held |= {axis: SAMPLES[axis] for axis in guards.broken({**sizes, **held})}
    return [{**sizes, **held} for sizes in SHAPES[1:]], held


def _nothing_saved(_: object) -> torch.Tensor:
    raise TrialError("the rule starts from saved deltas")


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    if len(found) != len(expected):
        raise TrialError(f"{what}: {len(found)} outputs for {len(expected)}")
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise TrialError(f"{what}: shape {tuple(a.shape)} for {tuple(b.shape)}")
        difference = float((a - b).masked_fill(a == b, 0).nan_to_num(0.0).abs().max()) if a.numel() else 0.0
        scale = max(1.0, float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())) if b.numel() else 1.0
        if bool((a.isnan() != b.isnan()).any()) or difference > TOLERANCE * scale:
            raise TrialError(f"{what} by {difference:.1e} of {scale:.1e}")
