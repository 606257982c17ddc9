"""insert: write the deltas of a plan into the graph. The only pass that grows it.

For each edit: bind x and h at the tap, lower the form to dh, compose h' and put it in the place of h; every edit
leaves an entry in the ledger. Attention over a prefix composed with `gate` is lowered by default to longer keys and
values, which is the same function (He et al. 2022, section 3.1) at the price of one attention; `lower: gated` keeps
the two attentions and the gate λ.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.ir.attention import Region
from peftc.ir.axis_names import axis_names, shown
from peftc.ir.builder import Builder, latest
from peftc.ir.order import make_room
from peftc.ir.prepend import prepend
from peftc.ir.program import Insertion, Program, shape_of
from peftc.ir.sites import Site, Tap
from peftc.lang.expr import names_in
from peftc.lang.lower import Lowering
from peftc.lang.rule import Delta, Expr, Hyper
from peftc.lang.shapes.named import Named, named
from peftc.planning.dtypes import widest
from peftc.planning.plan import Edit, Plan, input_tap
from peftc.planning.refer import Source
from peftc.rewriting import carry_site, rewrite_site

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Insert:
    """Write `plan` into the program."""

    name: ClassVar[str] = "insert"
    plan: Plan

    def apply(self, program: Program) -> None:
        for edit in self.plan.edits:
            if edit.delta.value is not None:
                program.carried.append(carry_site(program, edit))
            elif edit.delta.sets:
                program.ledger.extend(rewrite_site(program, edit))
            else:
                program.ledger.append(insert_edit(program, edit, self.plan.rule.hyper))
        program.graph.lint()


def insert_edit(program: Program, edit: Edit, hypers: Mapping[str, Hyper]) -> Insertion:
    """Write one edit that changes one tap; its entry for the ledger. Raises `PeftcError` E013, E024."""
    return _Inserter(program, edit, hypers).insert()


class _Inserter:
    """Inserts one edit."""

    def __init__(self, program: Program, edit: Edit, hypers: Mapping[str, Hyper]) -> None:
        self.program = program
        self.hypers = hypers
        self.edit = edit
        self.delta = edit.delta
        self.tap: Tap = edit.site.taps[edit.tap]
        self.parameters = {
            name: None if parameter is None else program.add_parameter(parameter)
            for name, parameter in edit.parameters.items()
        }
        self.compose = self._bare_word(edit.delta.compose.tree)
        self.held = edit.held(program)

    @staticmethod
    def _bare_word(tree: ast.expr) -> str:
        return tree.id if isinstance(tree, ast.Name) and tree.id in ("add", "gate", "prepend") else ""

    def insert(self) -> Insertion:
        form = self.delta.form
        if self.compose == "prepend":
            return self._prepend()
        if form.attend is None:
            if self.compose == "gate":
                self._refuse("`gate` weighs two attentions and needs a form with `attend`, such as `prefix`")
            return self._expression()
        region = self.edit.site.region
        if region is None or self.edit.tap != "heads":
            self._refuse(f"form `{form.name}` attends with the site's queries and needs `at: attention, modify: heads`")
        if self.compose == "gate" and self.delta.lower != "gated":
            return self._concat(region)
        return self._attend(region)

    def _refuse(self, reason: str) -> NoReturn:
        fail("E024", f"delta `{self.delta.name}`: {reason}", span=self.delta.span_at("compose"))

    def _builder(self, cursor: fx.Node) -> Builder:
        return Builder(self.program, cursor, label=self.edit.label, like=self._stack_source())

    def _stack_source(self) -> fx.Node:
        site = self.edit.site
        return site.anchor if "out" in site.taps else self.tap.anchor

    def _start(self, extra: list[fx.Node]) -> fx.Node:
        """The first place where every operand exists."""
        operands = [self.tap.current(self.program), *extra]
        operands += [node for node in self.parameters.values() if node is not None]
        start = latest(self.program.graph, [*operands, *self.program.bindings])
        self._refuse_late(start, operands)
        if self.tap.stacked and self.tap.user is not None:
            return self.tap.user.prev  # as late as can be: the weights of one mixture at a time are made and forgotten
        return start

    def _refuse_late(self, start: fx.Node, operands: list[fx.Node]) -> None:
        """h' must be there before anything reads it."""
        users = [self.tap.user] if self.tap.user is not None else [*self.tap.current(self.program).users]
        readers = [user for user in users if user not in self.held]
        if make_room(readers, start, operands):
            return
        for source in self.edit.sources.values():
            if not make_room(readers, source.current(self.program), ()):
                refuse_source(self.delta, source, self.edit.tap, self.edit.site)
        self._refuse(f"it reads a value that is computed from `{self.edit.tap}`")

    def _lowering(self, builder: Builder, tensors: dict[str, fx.Node | None]) -> Lowering:
        dtype, read = self._dtype(), self._names()
        parameters = {
            name: builder.cast(node, dtype) if node is not None and dtype is not None and name in read else node
            for name, node in self.parameters.items()
        }
        env: dict[str, Any] = {**self.edit.statics, **parameters, **tensors}
        return Lowering(builder, env, self.edit.site.describe(), self._named)

    def _named(self) -> Named | None:
        """The names of sizes at the edit's tap, for what is told of shapes."""
        edit = self.edit
        return named(edit.delta, self.hypers, edit.site.kind, edit.tap, edit.statics)

    def _shown(self, node: fx.Node, expr: Expr | None = None) -> str:
        """The shape of a node with its names: that of h, or of the value of `expr`."""
        names = self._named()
        sizes = shown(node.meta["val"].shape, axis_names(self.program))
        return f"[{', '.join(sizes)}]" if names is None else names.shape(sizes, expr, expr.tree if expr else None)

    def _dtype(self) -> torch.dtype | None:
        """That of the form's computations; see `peftc.planning.dtypes`."""
        return widest(node.meta["val"].dtype for node in self.parameters.values() if node is not None)

    def _names(self) -> set[str]:
        """Every value the delta's expressions read."""
        exprs = [*self.delta.let.values(), self.delta.compose]
        return self._form_names().union(*(names_in(expr) for expr in exprs))

    def _form_names(self) -> set[str]:
        form = self.delta.form
        exprs = [*form.let.values()]
        exprs += [form.dh] if form.dh is not None else []
        exprs += [form.attend.keys, form.attend.values] if form.attend is not None else []
        return set().union(*(names_in(expr) for expr in exprs))

    def _taps(self) -> dict[str, Tap]:
        """The site's taps that the delta mentions, where no parameter or static value bears the name."""
        taken = {*self.parameters, *self.edit.statics, *self.edit.sources, "x", "h"}
        names = self._names() - taken
        return {name: tap for name, tap in self.edit.site.taps.items() if name in names}

    def _tensors(self, builder: Builder, skip: str = "") -> dict[str, fx.Node | None]:
        """x, h and the site's taps that the delta mentions, cast once to the dtype of its parameters."""
        site = self.edit.site
        wanted = {name: tap for name, tap in self._taps().items() if name != skip}
        source = input_tap(self.delta, site, self.edit.tap)
        elsewhere = source != skip and self.delta.insert != "sequential"
        if source is not None and elsewhere and "x" in self._names():
            wanted["x"] = site.taps[source]
        dtype = self._dtype()
        tensors: dict[str, fx.Node | None] = {}
        for name, tap in {**wanted, **self.edit.sources}.items():
            value = tap.read(self.program, builder)
            tensors[name] = value if dtype is None else builder.cast(value, dtype)
        return tensors

    def _lets(self, lowering: Lowering, lets: dict[str, Any]) -> None:
        for name, expr in lets.items():
            lowering.env[name] = lowering.lower(expr)

    def _operand_nodes(self) -> list[fx.Node]:
        site = self.edit.site
        nodes = [tap.current(self.program) for tap in self._taps().values()]
        source = input_tap(self.delta, site, self.edit.tap)
        if source is not None:
            nodes.append(site.taps[source].current(self.program))
        return [*nodes, *(source.current(self.program) for source in self.edit.sources.values())]

    def _expression(self) -> Insertion:
        builder = self._builder(self._start(self._operand_nodes()))
        before = self.tap.read(self.program, builder)
        tensors = self._tensors(builder)
        sequential, dtype = self.delta.insert == "sequential", self._dtype()
        h = before
        if dtype is not None and (sequential or "h" in self._form_names()):
            h = builder.cast(before, dtype)
        if sequential:
            tensors["x"] = h
        lowering = self._lowering(builder, tensors)
        lowering.env["h"] = h
        self._lets(lowering, self.delta.form.let)
        assert self.delta.form.dh is not None
        dh = lowering.tensor(self.delta.form.dh)
        x = before if sequential else tensors.get("x")
        return self._finish(builder, lowering, before, x, dh, "expression")

    def _finish(
        self, builder: Builder, lowering: Lowering, before: fx.Node, x: fx.Node | None, dh: fx.Node, how: str
    ) -> Insertion:
        value = before.meta["val"]
        dtype = torch.promote_types(value.dtype, dh.meta["val"].dtype)
        read = lowering.env.get("h")
        h = read if isinstance(read, fx.Node) and read.meta["val"].dtype == dtype else builder.cast(before, dtype)
        lowering.env.update(h=h, dh=builder.cast(dh, dtype))
        self._lets(lowering, self.delta.let)
        compose = replace(_SUM, span=self.delta.span_at("compose")) if self.compose == "add" else self.delta.compose
        after = lowering.env["gated"] if self.compose == "gate" else lowering.tensor(compose)
        after = builder.cast(after, value.dtype)
        if after not in builder.nodes:
            after = builder.call(aten.alias.default, after)  # a node of its own: see `Tap.write`
        shape, wanted = tuple(after.meta["val"].shape), tuple(value.shape)
        if shape != wanted:
            fail(
                "E013",
                f"delta `{self.delta.name}` at {self.edit.site.describe()}: the new value is "
                f"{self._shown(after, compose)}, but `{self.edit.tap}` is {self._shown(before)}",
                span=self.delta.span_at("compose"),
                help=f"dh is {self._shown(dh, self.delta.form.dh)}; it must broadcast to h",
            )
        original = self.tap.current(self.program)
        written = self.tap.write(self.program, builder, after, self.held)
        return self._entry(builder, how, before, after, x, dh, original, written)

    def _entry(
        self,
        builder: Builder,
        how: str,
        before: fx.Node,
        after: fx.Node,
        x: fx.Node | None,
        dh: fx.Node | None,
        original: fx.Node,
        written: fx.Node,
    ) -> Insertion:
        edit = self.edit
        names = tuple(p.name for p in edit.parameters.values() if p is not None)
        nodes = tuple(builder.nodes)
        return Insertion(
            edit.label, edit.site, edit.tap, how, before, after, x, dh, original, written, nodes, names, held=self.held
        )

    def _prefix(self, builder: Builder) -> tuple[Lowering, fx.Node, fx.Node]:
        attend = self.delta.form.attend
        assert attend is not None
        lowering = self._lowering(builder, self._tensors(builder, skip=self.edit.tap))
        self._lets(lowering, self.delta.form.let)
        keys, values = lowering.tensor(attend.keys), lowering.tensor(attend.values)
        site = self.edit.site
        self._check_widths(keys, values, attend.keys)
        for name, width, part, node in (
            ("keys", "key_dim", attend.keys, keys),
            ("values", "head_dim", attend.values, values),
        ):
            shape = tuple(node.meta["val"].shape)
            if len(shape) not in (3, 4) or shape[-2] not in (site.dims["kv_heads"], site.dims["heads"]):
                fail(
                    "E013",
                    f"`attend.{name}` of form `{self.delta.form.name}` is {self._shown(node, part)} at "
                    f"{site.describe()}",
                    span=part.span,
                    help=f"it must be [l, kv_heads={site.dims['kv_heads']}, {width}={site.dims[width]}]",
                )
        return lowering, keys, values

    def _check_widths(self, keys: fx.Node, values: fx.Node, part: Expr) -> None:
        """Latent attention has keys wider than its values: such a prefix has rows that fit one of them only."""
        site = self.edit.site
        wanted = [site.dims["key_dim"], site.dims["head_dim"]]
        found = [shape_of(node)[-1] for node in (keys, values)]
        if found != wanted and wanted[0] != wanted[1]:
            fail(
                "E013",
                f"{site.describe()} has keys of width {wanted[0]} and values of width {wanted[1]}; form "
                f"`{self.delta.form.name}` makes rows of {found[0]} and {found[1]}",
                span=part.span,
                help="give the rows of the keys the width `key_dim` and those of the values `head_dim`",
            )

    def _concat(self, region: Region) -> Insertion:
        start = latest(self.program.graph, [region.entry, *self.program.bindings])
        for source in self.edit.sources.values():
            if start < source.current(self.program):
                refuse_source(self.delta, source, "heads", self.edit.site)
        builder = self._builder(start)
        _, keys, values = self._prefix(builder)
        region.extend(builder, keys, values)
        node = self.program.current(self.tap.node)
        return self._entry(builder, "concat", node, node, keys, values, node, node)

    def _attend(self, region: Region) -> Insertion:
        builder = self._builder(self._start(self._operand_nodes()))
        lowering, keys, values = self._prefix(builder)
        before = self.tap.read(self.program, builder)
        dh, partition = region.attend(builder, keys, values)
        if self.compose == "gate":
            base = region.log_partition(builder)
            gate = builder.call(aten.sigmoid.default, builder.call(aten.sub.Tensor, partition, base))
            step = builder.call(aten.mul.Tensor, gate, builder.call(aten.sub.Tensor, dh, before))
            lowering.env["gated"] = builder.call(aten.add.Tensor, before, step)
        return self._finish(builder, lowering, before, None, dh, "gated" if self.compose == "gate" else "expression")

    def _prepend(self) -> Insertion:
        if self.edit.site.kind != "model" or self.edit.tap != "embeddings":
            self._refuse("`prepend` lengthens the sequence and needs `at: model, modify: embeddings`")
        builder = self._builder(latest(self.program.graph, list(self.program.bindings)))
        lowering = self._lowering(builder, {})
        self._lets(lowering, self.delta.form.let)
        assert self.delta.form.dh is not None
        rows = lowering.tensor(self.delta.form.dh)
        before = self.tap.node
        try:
            after = prepend(self.program, builder, before, rows)
        except RuntimeError as error:  # the graph refuses the longer sequence, as a table of positions that ends does
            fail(
                "E024",
                f"delta `{self.delta.name}`: the model takes no sequence that is {rows.meta['val'].shape[0]} longer: "
                f"{str(error).splitlines()[0]}",
                span=self.delta.span_at("compose"),
                help="make the prompt shorter with --set; `max_position_embeddings` in config.json is a usual bound",
            )
        self.program.replaced[before] = after
        return self._entry(builder, "prepend", before, after, None, rows, before, after)


_SUM = Expr("h + dh", ast.parse("h + dh", mode="eval").body, exact=False)
"""What `compose: add` says."""


def refuse_source(delta: Delta, source: Source, tap: str, site: Site) -> NoReturn:
    """E024: a value of `from:` comes too late for a tap."""
    reference = source.reference
    message = f"`{reference.text}` is computed from `{tap}` of {site.describe()}, which it would change"
    help = "a row can read what does not depend on its tap: an earlier layer, or an earlier part of this one"
    fail("E024", f"delta `{delta.name}`: {message}", span=reference.span, help=help)
