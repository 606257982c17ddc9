"""The planner: a pure function from a rule and a site table to the list of edits, before anything is changed.

    plan = make_plan(rule, program)
    plan.edits      # one for each delta, site and tap, with its parameters and sizes
    plan.trained    # base parameters that the rule trains as they are

A rule that matches nothing is an error that shows the nearest miss; so is a parameter of impossible size.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftc.diagnostics import Collector, did_you_mean, fail
from peftc.ir.program import DeltaParameter, Program
from peftc.ir.sites import Site, Tap
from peftc.lang.init_graph import check_recipes
from peftc.lang.rule import Delta, Expr, Rule, Scalar
from peftc.lang.static import evaluate_static
from peftc.patterns.sites import Found, find
from peftc.planning.agreement import sites_like
from peftc.planning.arrange import arranged
from peftc.planning.budget import Spent, solve
from peftc.planning.dtypes import Dtypes
from peftc.planning.layered import check_layers, check_shared
from peftc.planning.parameters import parameter_of, ranks_of
from peftc.planning.reach import Unreached, unreached
from peftc.planning.refer import Source, referred
from peftc.planning.select import condition_env, nearest_miss, selected

if TYPE_CHECKING:
    import torch
    from torch import fx

_LARGEST = 2**30
"""Delta elements allowed whatever the base's size; beyond it a delta may be four times the base."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One delta at one tap of one site, or one entry of `rewrite` at one site, whose first tap is then `tap`; or one
    entry of `carry`, which changes no tap: `tap` is then the one whose sizes and dtype its parameters have.

    `statics` are the sizes and numbers its expressions see.
    """

    delta: Delta
    site: Site
    tap: str
    statics: dict[str, Scalar]
    parameters: dict[str, DeltaParameter | None] = field(default_factory=dict)
    """By the name the rule gives them; None where the parameter's `if` is false."""
    sources: dict[str, Source] = field(default_factory=dict)
    """The taps of other sites that its expressions read, by name."""

    @property
    def label(self) -> str:
        several = len(self.delta.modify) > 1 and not self.delta.sets
        return f"{self.delta.name}.{self.tap}" if several else self.delta.name

    @property
    def written(self) -> list[tuple[str, Tap]]:
        """The taps that it changes: one, or those of an entry of `rewrite` that the site has; none for `carry`."""
        if self.delta.value is not None:
            return []
        series = {**{name: (tap,) for name, tap in self.site.taps.items()}, **self.site.series}
        return [(name, tap) for name in self.delta.sets or (self.tap,) for tap in series.get(name, ())]

    def held(self, program: Program) -> frozenset[fx.Node]:
        """Nodes of the carried values that it reads: they keep what they see of the taps that it changes."""
        held: frozenset[fx.Node] = frozenset()
        return held.union(*(source.held(program) for source in self.sources.values()))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rule would do to a program."""

    rule: Rule
    edits: tuple[Edit, ...]
    trained: tuple[str, ...]
    """Base parameters trained as they are."""
    base_sizes: dict[str, int]
    budget: Spent | None = None
    """How a budget of the rule was spent; `rule` then holds the value found."""
    fresh: frozenset[str] = frozenset()
    """Those of `trained` that the checkpoint does not hold."""
    sites: tuple[Site, ...] = ()
    """What it was made from, of every kind."""
    unreached: tuple[Unreached, ...] = ()
    """What of the model the trace leaves aside."""

    @property
    def parameters(self) -> dict[str, DeltaParameter]:
        """Every delta parameter once, in order."""
        return {p.name: p for edit in self.edits for p in edit.parameters.values() if p is not None}

    @property
    def one_of_each_dtype(self) -> tuple[str, ...]:
        """The first parameter of each dtype."""
        found: dict[torch.dtype, str] = {}
        for name, parameter in self.parameters.items():
            found.setdefault(parameter.dtype, name)
        return tuple(found.values())

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters that train: deltas that are not frozen, and base parameters the rule trains."""
        return frozenset((*(name for name, p in self.parameters.items() if not p.frozen), *self.trained))

    @property
    def rates(self) -> dict[str, float]:
        """What the learning rate is multiplied by, by parameter, where that is not 1."""
        return {name: p.lr for name, p in self.parameters.items() if p.lr != 1.0 and not p.frozen}

    @property
    def base_count(self) -> int:
        return sum(self.base_sizes.values())

    @property
    def delta_count(self) -> int:
        return sum(p.numel for p in self.parameters.values() if not p.frozen)

    @property
    def trained_count(self) -> int:
        """Trainable elements: deltas that are not frozen, and base parameters the rule trains."""
        return self.delta_count + sum(self.base_sizes[name] for name in self.trained)

    @property
    def stored_count(self) -> int:
        """Elements in the delta directory."""
        return sum(p.numel for p in self.parameters.values()) + sum(self.base_sizes[name] for name in self.trained)

    @property
    def percent(self) -> float:
        """Trained elements per hundred of the base."""
        return 100 * self.trained_count / self.base_count

    def sites_of(self, delta: str) -> list[Site]:
        sites = {id(edit.site): edit.site for edit in self.edits if edit.delta.name == delta}
        return list(sites.values())


def make_plan(
    rule: Rule,
    program: Program,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    fresh: Collection[str] = (),
    like: Plan | None = None,
) -> Plan:
    """Plan `rule` on a located program. `dtypes` are those that delta parameters have now, where a model was converted.

    `like` is the plan of another trace of the model: only sites that it was made from are planned, as the layers that
    they were there.

    `fresh` are parameters that the checkpoint does not hold (a new classification head); they train always, for a
    head frozen at random values is never meant.

    The rule of the plan has a value where the one given has a budget.

    Raises `PeftcError`: E004, E008, E009, E014, E020 to E026, E051 to E053.
    """
    own = find(program, rule.patterns.values())
    located = (*program.sites, *own.sites)
    if like is not None:
        located = sites_like(like.sites, located)
    if rule.budgeted is not None:
        return solve(rule, lambda solved: _planned(solved, program, located, own, dtypes, fresh))
    return _planned(rule, program, located, own, dtypes, fresh)


def _planned(
    rule: Rule,
    program: Program,
    located: tuple[Site, ...],
    own: Found,
    dtypes: Mapping[str, torch.dtype] | None,
    fresh: Collection[str],
) -> Plan:
    """The plan of a rule without a budget; `own` is what its own patterns find, among `located`."""
    base = program.placeholders("parameter")
    sizes, kinds = _base_sizes(program), Dtypes.of(program, dtypes)
    collector = Collector()
    edits: list[Edit] = []
    carried = {delta.name: selected(delta, rule, located) for delta in rule.deltas if delta.value is not None}
    for delta in rule.deltas:
        sites = selected(delta, rule, located)
        if not sites:
            message, span, help_line = nearest_miss(delta, rule, located, own.missed)
            collector.error("E020", message, span=span, help=help_line)
            continue
        if delta.expect is not None and delta.expect != len(sites):
            collector.error(
                "E021",
                f"delta `{delta.name}` expects {delta.expect} sites and matches {len(sites)}",
                span=delta.span_at("expect"),
                help="`peftc sites` shows what the model has",
            )
        own_edits = list(_edits(rule, program, delta, sites, kinds, collector, located, carried))
        if not own_edits and delta.optional.issuperset(delta.modify):
            _report_missing(delta, " or ".join(delta.modify), sites, collector)
        edits.extend(own_edits)
    edits = arranged(edits)
    named = (name for name in base if name in fresh or _is_trained(rule, name))
    trained = tuple(dict.fromkeys(program.tied.get(name, name) for name in named))
    check_layers(rule, located, collector)
    check_shared(edits, collector)
    for glob in rule.train:
        if not any(fnmatch.fnmatchcase(name, glob.pattern) for name in base):
            collector.error(
                "E025",
                f"`train: {glob.pattern}` matches no parameter of the model",
                span=glob.span,
                help=did_you_mean(glob.pattern, {name.split(".")[0] + ".*" for name in base}),
            )
    collector.raise_if_errors()
    plan = Plan(
        rule, tuple(edits), trained, sizes, fresh=frozenset(trained).intersection(fresh), sites=located,
        unreached=unreached(program),
    )  # fmt: skip
    _refuse_absurd(plan)
    check_recipes(plan.parameters.values())
    return plan


def _base_sizes(program: Program) -> dict[str, int]:
    """Elements of each base parameter; tied names count once, under the first."""
    sizes = {}
    for name, node in program.placeholders("parameter").items():
        if name not in program.delta_parameters:
            sizes[name] = 0 if name in program.tied else int(node.meta["val"].numel())
    return sizes


def _is_trained(rule: Rule, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob.pattern) for glob in rule.train)


def _edits(
    rule: Rule,
    program: Program,
    delta: Delta,
    sites: list[Site],
    kinds: Dtypes,
    collector: Collector,
    every: Sequence[Site],
    carried: Mapping[str, Sequence[Site]],
) -> Iterable[Edit]:
    ranks = ranks_of(sites)
    for tap in (tap for tap in delta.modify if tap not in delta.optional):
        _report_missing(delta, tap, [site for site in sites if tap not in site.taps], collector)
    for site in sites:
        sources = referred(delta, site, condition_env(site, rule), every, carried)
        taps = [tap for tap in delta.modify if tap in site.taps] if delta.value is None else [_main_tap(site)]
        for tap in taps[:1] if delta.sets else taps:  # an entry of `rewrite` is one edit of all its taps
            statics = site_statics(rule, delta, site, tap, sources)
            edit = Edit(delta, site, tap, statics, sources=sources)
            for param in (*delta.form.params, *delta.params):
                edit.parameters[param.name] = parameter_of(program, edit, param, sites, ranks, kinds)
            yield edit


def _main_tap(site: Site) -> str:
    """The tap that stands for a site at which nothing is changed."""
    return next((name for name in ("out", "embeddings") if name in site.taps), next(iter(site.taps)))


def _report_missing(delta: Delta, tap: str, sites: list[Site], collector: Collector) -> None:
    if not sites:
        return
    site, more = sites[0], f" (and {len(sites) - 1} more sites)" if len(sites) > 1 else ""
    reason = site.missing.get(tap, f"{site.describe()} has no tap `{tap}`")
    collector.error(
        "E004",
        f"delta `{delta.name}` {'sets' if delta.sets else 'modifies'} `{tap}` of {site.describe()}{more}: {reason}",
        span=delta.span_at(f"set.{tap}" if delta.sets else "modify"),
        help=f"it has: {', '.join(site.taps)}; `where` narrows the sites",
    )


def site_statics(rule: Rule, delta: Delta, site: Site, tap: str, sources: Mapping[str, Source]) -> dict[str, Scalar]:
    """The static names a delta's expressions see: dimensions, then form arguments, hyperparameters, `with`."""
    env: dict[str, Scalar] = {}
    env.update({name: value for name, value in site.dims.items() if name not in ("d_in", "d_out")})
    value = site.taps[tap]
    shape = value.canonical_shape
    if value.stacked:  # one weight or bias for each expert
        shape = shape[1:]
    weight = tap == "weight" or (value.is_parameter and len(shape) > 1)
    env["d_out"] = int(shape[0]) if weight else value.width  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    if weight and len(shape) > 1:
        env["d_in"] = int(shape[1])  # pyright: ignore[reportArgumentType]
    source = input_tap(delta, site, tap)
    if not weight and source is not None:
        env["d_in"] = site.taps[source].width
    if "x" in sources:
        env["d_in"] = sources["x"].tap.width
    env.setdefault("d_in", env["d_out"])
    env["has_bias"] = bool(site.dims.get("has_bias", False))
    env.update({name: arg for name, arg in delta.form.args.items() if name not in rule.hyper})
    env.update(rule.values_at(site.layer, int(site.dims.get("layers", 0))))
    for name, argument in delta.arguments.items():
        env[name] = evaluate_static(argument, env) if isinstance(argument, Expr) else argument
    return env


def input_tap(delta: Delta, site: Site, tap: str) -> str | None:
    """The tap that is the delta's input x, or None where the insertion has none (weights, biases, embeddings)."""
    if "x" in delta.sources:
        return None
    if delta.insert == "sequential":
        return tap
    name = delta.insert
    if name == "parallel":
        name = "ctx" if tap in ("k", "v") and "ctx" in site.taps else "x"
    if name in site.taps:
        return name
    if delta.insert in ("parallel", "x"):
        return None
    fail(
        "E004",
        f"delta `{delta.name}` reads `{name}` of {site.describe()}: {site.missing.get(name, 'no such tap')}",
        span=delta.span_at("insert"),
        help=did_you_mean(name, site.taps),
    )


def _refuse_absurd(plan: Plan) -> None:
    total = sum(p.numel for p in plan.parameters.values())
    if total > max(_LARGEST, 4 * plan.base_count):
        largest = max(plan.parameters.values(), key=lambda p: p.numel)
        fail(
            "E022",
            f"the deltas would have {total:,} parameters, the base has {plan.base_count:,}; "
            f"the largest is {largest.name} of shape {list(largest.shape)}",
            span=next(e.delta.span for e in plan.edits if largest in e.parameters.values()),
            help="make the rank or the prefix shorter with --set",
        )
