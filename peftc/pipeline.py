"""The pipeline as data: which passes run over a program, in which order, verified in between.

program = analyse(skeleton, inputs)     # trace, normalize, locate
plan = rewrite(program, rule)           # plan, insert, verify
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from peftc.diagnostics import did_you_mean, fail

if TYPE_CHECKING:
    import torch

    from peftc.frontend.cache import CacheLayout
    from peftc.frontend.trace import InputSpec, Skeleton
    from peftc.ir.program import Program
    from peftc.lang.rule import Rule
    from peftc.planning.plan import Plan

PASSES: dict[str, str] = {
    "normalize": "peftc.passes.normalize:Normalize",
    "locate": "peftc.passes.locate:Locate",
    "insert": "peftc.passes.insert:Insert",
    "mix": "peftc.passes.mix:Mix",
    "freeze": "peftc.passes.freeze:Freeze",
    "set-mode": "peftc.passes.set_mode:SetMode",
    "quantize": "peftc.passes.quantize:Quantize",
    "fold": "peftc.passes.fold:Fold",
    "verify": "peftc.passes.verify:Verify",
}
"""Pass names to where they live; a pass is imported when it is used."""


class Pass(Protocol):
    """What a pass is: a name, and a change of a program in place."""

    @property
    def name(self) -> str: ...
    def apply(self, program: Program) -> None: ...


def load_pass(name: str) -> type[Any]:
    """The class of a pass by its name."""
    if name not in PASSES:
        fail("E003", f"unknown pass `{name}`", help=did_you_mean(name, PASSES))
    module, _, cls = PASSES[name].partition(":")
    return getattr(importlib.import_module(module), cls)


Watcher = Callable[[str, "Program", float], None]
"""Called after each pass with its name, the program and the seconds it took."""


def run(program: Program, passes: Sequence[Pass], watch: Watcher | None = None) -> None:
    """Run `passes` in order over `program`, verifying after each."""
    verify = load_pass("verify")
    for step in passes:
        start = time.perf_counter()
        step.apply(program)
        verify(after=step.name).apply(program)
        if watch is not None:
            watch(step.name, program, time.perf_counter() - start)


def analyse(
    skeleton: Skeleton,
    inputs: Mapping[str, InputSpec],
    flags: Mapping[str, Any] | None = None,
    layout: CacheLayout | None = None,
    watch: Watcher | None = None,
) -> Program:
    """Trace a model and find its sites. `layout` is that of a cache among the inputs."""
    from peftc.frontend.trace import trace

    program = trace(skeleton, inputs, flags, layout)
    run(program, [load_pass("normalize")(), load_pass("locate")()], watch)
    return program


def rewrite(
    program: Program,
    rule: Rule,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    fresh: Collection[str] = (),
    like: Plan | None = None,
    watch: Watcher | None = None,
) -> Plan:
    """Plan `rule` on a located program and insert its deltas; see `peftc.planning.plan.make_plan` for the options."""
    from peftc.planning.plan import make_plan

    plan = make_plan(rule, program, dtypes=dtypes, fresh=fresh, like=like)
    run(program, [load_pass("insert")(plan), load_pass("freeze")(plan)], watch)
    return plan
