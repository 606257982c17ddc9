"""Referring: which tap of which site a reference of `from:` is, for one site of the row.

Layers are counted within a stack, and a reference stays in the stack of the row's site unless it names one. Where
the index leads out of the model, or several sites answer to it, that is an error: `where` narrows the row to the
layers for which the reference means something, or an alternative (`a or b`) stands in for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from torch import fx

from peftc.diagnostics import fail
from peftc.ir.sites import Site, Tap
from peftc.lang.expr import names_in
from peftc.lang.rule import Delta, Reference, Scalar
from peftc.lang.static import evaluate_static

if TYPE_CHECKING:
    from peftc.ir.builder import Builder
    from peftc.ir.program import Program


@dataclass(frozen=True, slots=True)
class Source:
    """What a name under `from:` stands for at one site: a tap, or the value that an entry of `carry` has there."""

    reference: Reference
    site: Site

    @property
    def tap(self) -> Tap:
        return self.site.taps[self.reference.tap]

    @property
    def carried(self) -> str:
        """The entry of `carry`, "" for a tap."""
        return "" if self.reference.tap else self.reference.kind

    def current(self, program: Program) -> fx.Node:
        """The node that carries the value now."""
        return program.carried_at(self.carried, self.site).node if self.carried else self.tap.current(program)

    def read(self, program: Program, builder: Builder) -> fx.Node:
        """The value, in canonical layout."""
        return self.current(program) if self.carried else self.tap.read(program, builder)

    def held(self, program: Program) -> frozenset[fx.Node]:
        """The nodes that a carried value is computed by, itself and through others."""
        return program.carried_at(self.carried, self.site).nodes if self.carried else frozenset()


def referred(
    delta: Delta,
    site: Site,
    env: Mapping[str, Scalar],
    sites: Sequence[Site],
    carried: Mapping[str, Sequence[Site]],
) -> dict[str, Source]:
    """The sources of `delta` at `site`, by name; `env` is what indices may read, `carried` the sites of each entry of
    `carry`. Raises `PeftcError` E004, E026."""
    found: dict[str, Source] = {}
    for name, reference in delta.sources.items():
        for choice in reference.choices:
            own = sites if choice.tap else carried.get(choice.kind, ())
            search = _Search(delta, choice, site, own)
            try:
                found[name] = search.source(env)
                break
            except _NothingError as nothing:
                if choice.otherwise is None:
                    search.fail(nothing.reason, nothing.help)
    return found


@dataclass(slots=True)
class _NothingError(Exception):
    """A reference leads to no site."""

    reason: str
    help: str


@dataclass(frozen=True, slots=True)
class _Search:
    """The search for one reference."""

    delta: Delta
    reference: Reference
    site: Site
    sites: Sequence[Site]

    def source(self, env: Mapping[str, Scalar]) -> Source:
        found = self._candidates(env)
        if len(found) > 1:
            paths = ", ".join(other.path or "(root)" for other in found[:4]) + (", ..." if len(found) > 4 else "")
            help = "name a kind of site of which a layer has one"
            help = help if self.reference.tap else f"`where` of `{self.reference.kind}` narrows its sites"
            self.fail(f"is one of {len(found)} sites: {paths}", help)
        (site,) = found
        tap = self.reference.tap
        if tap and tap not in site.taps:
            reason = site.missing.get(tap, f"{site.describe()} has no tap `{tap}`")
            message = f"delta `{self.delta.name}` reads `{self.reference.text}`: {reason}"
            fail("E004", message, span=self.reference.span, help=f"it has: {', '.join(site.taps)}")
        return Source(self.reference, site)

    def _candidates(self, env: Mapping[str, Scalar]) -> list[Site]:
        """The sites that the reference names; at least one."""
        kind = self.reference.kind
        carried = not self.reference.tap  # its sites are given, of whatever kind
        of_kind = [other for other in self.sites if carried or other.kind == kind]
        if not of_kind:
            raise _NothingError(
                f"names a kind of site that this model has not: {kind}", "`peftc sites` shows what there is"
            )
        if all(other.kind == "model" for other in of_kind):
            return of_kind
        stack = self._stack(of_kind)
        in_stack = [other for other in of_kind if other.stack == stack]
        in_stack = [other for other in in_stack if other.tower == self.site.tower] or in_stack
        if not in_stack:
            has = " and ".join(sorted({other.stack for other in of_kind}))
            raise _NothingError(
                f"names the {stack}, where this model has no {kind}", f"its {kind} sites are in the {has}"
            )
        layer = self._layer(env, in_stack)
        found = [other for other in in_stack if other.layer == layer]
        if not found:
            has = ", ".join(str(n) for n in sorted({other.layer for other in in_stack if other.layer >= 0})[:8])
            named = "outside of blocks" if layer < 0 else f"in layer {layer}"
            raise _NothingError(f"names no site {named} of the {stack}", f"layers with {kind} sites: {has or 'none'}")
        return found

    def _stack(self, of_kind: list[Site]) -> str:
        """The stack that is named, that of the row's site, or the only one where the site is in none."""
        if self.reference.stack:
            return self.reference.stack
        stacks = sorted({other.stack for other in of_kind})
        if self.site.layer >= 0 and self.site.stack in stacks:
            return self.site.stack
        if len(stacks) > 1:
            self.fail(f"may be in the {' or the '.join(stacks)}", f"write `{stacks[0]}.{self.reference.text}`, say")
        return stacks[0]

    def _layer(self, env: Mapping[str, Scalar], in_stack: list[Site]) -> int:
        if self.reference.index is None:
            return self.site.layer
        layer = evaluate_static(self.reference.index, env)
        if isinstance(layer, bool) or not isinstance(layer, int):
            self.fail(f"has the index {layer}, which is no layer", "an index is a whole number")
        count = 1 + max(other.layer for other in in_stack)
        relative = "layer" in names_in(self.reference.index)  # `layer - 1` of layer 0 is not the last layer
        index = layer + count if layer < 0 and not relative else layer
        if not 0 <= index < count:
            help = f"there are layers 0 to {count - 1}; `where: {{if: ...}}` narrows the row"
            help += "" if self.reference.tap else f", and `{self.reference.text} or ...` says what is read instead"
            raise _NothingError(f"is layer {layer} of the {in_stack[0].stack}", help)
        return index

    def fail(self, reason: str, help: str) -> NoReturn:
        message = f"delta `{self.delta.name}` at {self.site.describe()}: `{self.reference.text}` {reason}"
        fail("E026", message, span=self.reference.span, help=help)
