"""From matches to sites: what a rule's own kinds of sites are in one model, and why a pattern found none.

    found = find(program, rule.patterns.values())
    found.sites, found.missed["swiglu"]().told()

Of two matches that share an output, the first in graph order stays; inputs and values on the way may be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from torch import fx

from peftc.diagnostics import Span
from peftc.ir.program import Program, module_path
from peftc.ir.sites import Linear, Site, Tap, as_linear
from peftc.lang.static import evaluate_static
from peftc.locate.blocks import place_in_blocks
from peftc.locate.walk import common_path
from peftc.patterns.graph import GraphIndex, part_of, step_over
from peftc.patterns.judge import Judge, Parameter
from peftc.patterns.match import Bound, Match, Matcher, Miss, described
from peftc.patterns.terms import Call, Leaf, Nearest, Pattern, Piece, Place, Shape


@dataclass(frozen=True, slots=True)
class NearestMiss:
    """Why a pattern found nothing: of the `candidates`, `alike` came as far as `miss` tells, and none further."""

    pattern: Pattern
    candidates: int
    alike: int
    miss: Miss | None
    """None where the model has no candidate at all."""

    def told(self) -> tuple[str, Span | None, str]:
        """Message, place in the pattern, and where in the model."""
        if self.miss is None:
            root = self.pattern.variants[0].roots[0]
            assert isinstance(root, (Call, Piece))
            return f"this model has no `{root.title}`, the op of the pattern's output", root.place.span, ""
        count = f"{self.candidates} candidate{'' if self.candidates == 1 else 's'}"
        nearest = "it" if self.candidates == 1 else f"the nearest {'' if self.alike == 1 else self.alike}".rstrip()
        where = module_path(self.miss.node) if self.miss.node is not None else ""
        has = "has" if self.alike == 1 else "have"
        message = f"`{self.miss.place.line}`: {count}; {nearest} {has} {self.miss.reason}"
        return message, self.miss.place.span, f"at {where}" if where else ""


@dataclass(slots=True)
class Found:
    """The sites of some patterns, in graph order within each, and the nearest miss of those without a site."""

    sites: list[Site] = field(default_factory=list)
    missed: dict[str, Callable[[], NearestMiss]] = field(default_factory=dict)


def find(program: Program, patterns: Iterable[Pattern]) -> Found:
    """Every site of `patterns` in a located program."""
    index, found = GraphIndex(program), Found()
    for pattern in patterns:
        sites = {match.outputs()[0]: _site(program, pattern, match, dims) for match, dims in matches(index, pattern)}
        if not sites:
            found.missed[pattern.name] = partial(nearest_miss, index, pattern)  # looked for when it is told
        place_in_blocks(program, sites)
        found.sites += _numbered([*sites.values()])
    return found


def matches(index: GraphIndex, pattern: Pattern) -> list[tuple[Match, dict[str, int]]]:
    """The matches of a pattern in graph order, with their dimensions; the first variant that matches a root has it."""
    roots: dict[fx.Node, tuple[Match, dict[str, int]]] = {}
    for variant in pattern.variants:
        matcher = Matcher(index, variant, Judge(index.program))
        for node in matcher.roots():
            match = None if node in roots else matcher.at(node)
            if match is not None and isinstance(dims := _dimensions(pattern, match), dict):
                roots[node] = match, dims
    taken: set[fx.Node] = set()
    kept: list[tuple[Match, dict[str, int]]] = []
    for node in sorted(roots, key=index.order.__getitem__):
        outputs = set(roots[node][0].outputs())
        if not outputs & taken:
            kept.append(roots[node])
            taken |= outputs
    return kept


def nearest_miss(index: GraphIndex, pattern: Pattern) -> NearestMiss:
    """The candidate that came furthest, over all variants."""
    misses: dict[fx.Node, Miss] = {}
    for variant in pattern.variants:
        matcher = Matcher(index, variant, Judge(index.program), explain=True)
        for node in matcher.roots():
            match = matcher.at(node)
            failed = _dimensions(pattern, match) if match is not None else matcher.miss
            if isinstance(failed, Miss) and (node not in misses or failed.score > misses[node].score):
                misses[node] = failed
    best = max(misses.values(), key=lambda miss: miss.score, default=None)
    alike = [miss for miss in misses.values() if best is not None and miss.score == best.score]
    same = [miss for miss in alike if best is not None and (miss.place, miss.reason) == (best.place, best.reason)]
    return NearestMiss(pattern, len(misses), len(same), best)


_WHOLE = 1000.0
"""The score of a match that only a condition refuses: further than any other."""


def _dimensions(pattern: Pattern, match: Match) -> dict[str, int] | Miss:
    """The dimensions that a match binds, or the first condition of the pattern that it does not meet."""
    dims: dict[str, int] = {}
    root = match.outputs()[0]
    for term in match.nodes:
        if isinstance(term, Piece) and not _in_step(match, term):
            return Miss(_WHOLE, term.place, match.nodes[term], "other parts than the pattern")
    for shape in pattern.shapes:
        refused = _bind(shape, match.value(shape.value), dims)
        if refused is not None:
            return Miss(_WHOLE, shape.place, root, refused)
    condition = pattern.where
    if condition is not None and dims.keys() >= set(pattern.dims) and not evaluate_static(condition, {**dims}):
        sizes = ", ".join(f"{name}={size}" for name, size in dims.items())
        place = Place(condition.text, f"where: {condition.text}", condition.span)
        return Miss(_WHOLE, place, root, sizes)
    for place in pattern.single:
        reader = _other_reader(match, place.text)
        if reader is not None:
            return Miss(_WHOLE, place, reader, f"another reader of `{place.text}`, {described(reader)}")
    return dims


def _in_step(match: Match, term: Piece) -> bool:
    """Whether a part ends where the next one of its line starts."""
    nodes = [match.nodes.get(part) for part in term.siblings[term.index : term.index + 2]]
    parts = [part_of(node) for node in nodes if node is not None]
    return len(parts) < 2 or (parts[0] is not None and parts[1] is not None and parts[0].stop == parts[1].start)


def _bind(shape: Shape, value: Bound, dims: dict[str, int]) -> str | None:
    """Bind the names of a shape; why it does not fit, or None."""
    if not isinstance(value, Parameter):
        return None  # absent, or of another variant
    sizes = [int(size) for size in value.node.meta["val"].shape]
    sizes = sizes[::-1] if value.transposed else sizes
    if len(sizes) != len(shape.sizes):
        return f"`{shape.value}` of shape {sizes}"
    for wanted, size in zip(shape.sizes, sizes, strict=True):
        known = dims.setdefault(wanted, size) if isinstance(wanted, str) else wanted
        if known is not None and known != size:
            return f"`{shape.value}` of shape {sizes}, where {wanted} is {known}"
    return None


def _other_reader(match: Match, name: str) -> fx.Node | None:
    """A node outside of the match that reads a value, past what is stepped over."""
    value = match.value(name)
    members = set(match.nodes.values())
    queue = [value] if isinstance(value, fx.Node) else []
    while queue:
        node = queue.pop()
        for user in node.users:
            if user in members:
                continue
            if step_over(user, any_axis=True) is not node:
                return user
            queue.append(user)
    return None


def _site(program: Program, pattern: Pattern, match: Match, dims: dict[str, int]) -> Site:
    taps: dict[str, Tap] = {}
    missing: dict[str, str] = {}
    for tap, name in pattern.taps.items():
        made = _tap(program, tap, name, match.value(name))
        if isinstance(made, Tap):
            taps[tap] = made
        else:
            missing[tap] = made
    names = {value: tap for tap, value in pattern.taps.items()}
    linears = _linears(program, match, names)
    own = [linear.node for linear in linears.values()] or list(match.nodes.values())
    path = _owner(common_path(module_path(node) for node in own), [module_path(node) for node in own])
    return Site(pattern.name, path, taps, {**dims}, linears=linears, missing=missing)


def _owner(path: str, inner: list[str]) -> str:
    """The module around a list of layers, which is no place for parameters."""
    listed = any(member[len(path) + 1 :].split(".")[0].isdigit() for member in inner if member != path)
    return path.rpartition(".")[0] if listed else path


def _tap(program: Program, tap: str, name: str, value: Bound) -> Tap | str:
    """The tap, or why there is none."""
    if isinstance(value, Parameter):
        return Tap(tap, value.node, "transposed" if value.transposed else "flat", user=value.reader)
    if not isinstance(value, fx.Node):
        return f"`{name}` is {'absent' if value is None else f'the number {value}'} here"
    if not hasattr(value.meta.get("val"), "shape"):
        return f"`{name}` is no tensor here"
    return Tap(tap, value)


def _linears(program: Program, match: Match, names: dict[str, str]) -> dict[str, Linear]:
    """The linear layers of a match; the role of each is the tap of its output, else that of its weight."""
    given = {id(term.call if isinstance(term, Nearest) else term): name for name, term in match.variant.values.items()}
    found: dict[str, Linear] = {}
    for term, node in match.nodes.items():
        linear = as_linear(program, node)
        if linear is None or not isinstance(term, Call):
            continue
        weight = term.operands[1] if len(term.operands) > 1 else None
        role = given.get(id(term)) or (weight.name if isinstance(weight, Leaf) else node.name)
        found[names.get(role, role)] = linear
    return found


def _numbered(sites: list[Site]) -> list[Site]:
    """Sites of no parameter of their own are told apart by their order in the graph."""
    for number, site in enumerate(sites):
        weights = tuple(tap.node.name for tap in site.taps.values() if tap.user is not None)
        site.identity = weights or (site.kind, str(number))
    return sites
