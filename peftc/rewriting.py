"""Rewriting: the taps of an entry of `rewrite:` replaced at one site, all expressions reading what was there before.

The old values are read first and stay what they are for the entry's own nodes; the rest of the graph reads the new
ones. Each tap is written where its expression can be computed, in the order of the graph, and has an entry of its own
in the ledger. At the `model` site a tap may change its length (a prompt makes the sequence longer): every shape after
it is then computed anew.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.ir.builder import Builder, latest
from peftc.ir.order import make_room
from peftc.ir.program import Carried, Insertion, Program, shape_of
from peftc.ir.sites import Tap
from peftc.lang.expr import name_nodes, names_in
from peftc.lang.lower import Lowering
from peftc.lang.rule import Expr
from peftc.lang.sites import SITES
from peftc.planning.dtypes import widest
from peftc.planning.plan import Edit, input_tap
from peftc.planning.refer import Source

aten = torch.ops.aten


def rewrite_site(program: Program, edit: Edit) -> list[Insertion]:
    """Write one entry at one site; the ledger entries, one for each tap. Raises `PeftcError` E004, E009, E013, E024."""
    return _Rewriter(program, edit).rewrite()


def carry_site(program: Program, edit: Edit) -> Carried:
    """Write the value of one entry of `carry` at one site. Raises `PeftcError` E004, E009, E013."""
    return _Carrier(program, edit).carry()


class _Rewriter:
    """Writes one entry of `rewrite` at one site."""

    def __init__(self, program: Program, edit: Edit) -> None:
        self.program, self.edit, self.delta, self.site = program, edit, edit.delta, edit.site
        self.parameters = {
            name: None if parameter is None else program.add_parameter(parameter)
            for name, parameter in edit.parameters.items()
        }
        self.held = edit.held(program)
        self.first = next(reversed(program.bindings))
        stack = self.site.anchor if "out" in self.site.taps or self.site.kind == "experts" else self.first
        self.builder = Builder(program, self.first, label=edit.label, like=stack)
        self.dtype = self._dtype()
        self.raw: dict[tuple[str, int], fx.Node] = {}
        """The taps as they were, in canonical layout."""
        cast = {name: None if node is None else self._cast(node) for name, node in self.parameters.items()}
        self.env: dict[str, Any] = {**edit.statics, **cast}
        self.inputs: dict[str, fx.Node] = {}
        """What expressions read by the names of taps and of `from`."""
        self.lets: dict[str, fx.Node | Any] = {}
        self.resized: Expr | None = None
        """What has changed a length, while the shapes after it are yet to be computed."""

    def _dtype(self) -> torch.dtype | None:
        """The widest of the parameters and of the taps that are set, for no expression may round them; see
        `peftc.planning.dtypes`. None without parameters.
        """
        own = [node.meta["val"].dtype for node in self.parameters.values() if node is not None]
        taps = [self.site.taps[name].node.meta["val"].dtype for name in self.delta.sets if name in self.site.taps]
        return widest([*own, *(dtype for dtype in taps if dtype.is_floating_point)]) if own else None

    def rewrite(self) -> list[Insertion]:
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        places = [
            (order[tap.current(self.program)], name, index, tap)
            for name in self.delta.sets
            for index, tap in enumerate(self.site.series.get(name) or [t for t in (self.site.taps.get(name),) if t])
        ]
        places.sort(key=lambda place: place[0])
        self._read([(name, index, tap) for _, name, index, tap in places])
        entries = [self._set(name, index, tap) for _, name, index, tap in places]
        self._propagate()
        return entries

    def _read(self, written: list[tuple[str, int, Tap]]) -> None:
        """Read every tap that is written or named, before any of them is replaced."""
        for name, index, tap in written:
            self.raw[name, index] = self._value(tap)
        exprs = [*self.delta.sets.values(), *self.delta.let.values()]
        exprs += [self.delta.value] if self.delta.value is not None else []
        named = {name: expr for expr in exprs for name in names_in(expr)}
        for name in sorted(named.keys() & {*SITES.get(self.site.kind, ()), *self.site.taps} - self.env.keys()):
            if name in self.site.taps:
                value = self.raw.get((name, 0)) or self._value(self.site.taps[name])
                self.inputs[name] = self._cast(value)
            elif name not in self.delta.optional:
                self._refuse_absent(name, named[name])
        for name, source in self.edit.sources.items():
            self.inputs[name] = self._cast(self._value(source))

    def _value(self, tap: Tap | Source) -> fx.Node:
        self._move([tap.current(self.program)])
        return tap.read(self.program, self.builder)

    def _move(self, operands: list[fx.Node]) -> None:
        """To the first place where every operand exists."""
        self.builder.cursor = latest(self.program.graph, [*operands, *self.program.bindings])

    def _cast(self, value: fx.Node) -> fx.Node:
        """`value` in the dtype of the entry's parameters, where it is of a floating dtype."""
        if self.dtype is None or not value.meta["val"].is_floating_point():
            return value
        self._move([value])
        return self.builder.cast(value, self.dtype)

    def _set(self, name: str, index: int, tap: Tap) -> Insertion:
        before, expr = self.raw[name, index], self.delta.sets[name]
        if before.op != "placeholder":
            self._propagate()  # inputs change together: a mask does not fit longer ids
        own = {**self.inputs, "h": self._cast(before)}
        if name in own:
            own[name] = own["h"]
        needed = self._needed(expr)
        lets = [self.lets[let] for let in needed if isinstance(self.lets.get(let), fx.Node)]
        read = {name for part in (expr, *(self.delta.let[let] for let in needed)) for name in names_in(part)}
        self._move([before, *lets, *(own[name] for name in sorted(read & own.keys()))])
        lowering = Lowering(self.builder, {**self.env, **own, **self.lets}, self.site.describe())
        for let in needed:
            if let not in self.lets:
                self.lets[let] = lowering.env[let] = lowering.lower(self.delta.let[let])
        mark = len(self.builder.nodes)
        after = self.builder.cast(lowering.tensor(expr), before.meta["val"].dtype)
        if after not in self.builder.nodes[mark:]:
            after = self.builder.call(aten.alias.default, after)  # a node of its own: see `Tap.write`
        self._check_shape(name, before, after, expr)
        self._refuse_late(name, tap, after, expr)
        original = tap.current(self.program)
        longer = shape_of(after) != shape_of(before)
        written = tap.write(self.program, self.builder, after, self.held)
        self.resized = expr if longer else self.resized
        return self._entry(name, before, after, original, written, read)

    def _needed(self, expr: Expr) -> list[str]:
        """The `let` names that `expr` reads, itself or through others, in order."""
        found: set[str] = set()
        queue = [expr]
        while queue:
            new = names_in(queue.pop()) & self.delta.let.keys() - found
            found |= new
            queue.extend(self.delta.let[name] for name in new)
        return [name for name in self.delta.let if name in found]

    def _entry(
        self, name: str, before: fx.Node, after: fx.Node, original: fx.Node, written: fx.Node, read: set[str]
    ) -> Insertion:
        wanted, queue, own = set[fx.Node](), [written], set(self.builder.nodes)
        while queue:
            node = queue.pop()
            if node in own and node not in wanted:
                wanted.add(node)
                queue.extend(node.all_input_nodes)
        nodes = tuple(node for node in self.program.graph.nodes if node in wanted)
        parameters = tuple(p.name for p in self.edit.parameters.values() if p is not None)
        x = self._stream(name, read)
        group = self.edit if len(self.delta.sets) > 1 else None
        label = f"{self.edit.label}.{name}" if len(self.delta.sets) > 1 else self.edit.label
        return Insertion(
            label, self.site, name, "rewrite", before, after, x, None, original, written, nodes, parameters, group,
            self.held,
        )  # fmt: skip

    def _stream(self, name: str, read: set[str]) -> fx.Node | None:
        """The one value beside the tap itself that the expression reads, where there is one: x for a fold."""
        others = sorted((read & self.inputs.keys()) - {name})
        if len(others) == 1:
            return self.inputs[others[0]]
        parallel = input_tap(self.delta, self.site, name)
        return self.inputs[parallel] if parallel in others else None

    def _check_shape(self, name: str, before: fx.Node, after: fx.Node, expr: Expr) -> None:
        new, old = shape_of(after), shape_of(before)
        resizes = self.site.kind == "model" and len(new) == len(old)
        if new != old and not (
            resizes and all(a == b or not isinstance(b, int) for a, b in zip(new, old, strict=True))
        ):
            message = f"`set` of `{self.delta.name}` at {self.site.describe()}: `{name}` is {_sizes(old)}"
            fail("E013", f"{message}, its new value {_sizes(new)}", span=expr.span, help="the shapes must be the same")

    def _refuse_late(self, name: str, tap: Tap, after: fx.Node, expr: Expr) -> None:
        own = {*self.builder.nodes, *self.held}
        readers = [tap.user] if tap.user is not None else [*tap.current(self.program).users]
        readers = [reader for reader in readers if reader not in own]
        if make_room(readers, after, ()):
            return
        late = [key for key, node in self.inputs.items() if not make_room(readers, node, ())]
        reason = f"`{late[0]}` is computed from it" if late else "a value it reads is computed from it"
        message = f"`set` of `{self.delta.name}` at {self.site.describe()}: `{name}` cannot be changed here: {reason}"
        fail("E024", message, span=_place(expr, late), help="a tap can be made of what does not depend on it")

    def _refuse_absent(self, name: str, expr: Expr) -> NoReturn:
        reason = self.site.missing.get(name, f"{self.site.describe()} has no tap `{name}`")
        message = f"`{self.delta.name}` reads `{name}` of {self.site.describe()}: {reason}"
        fail("E004", message, span=_place(expr, [name]), help=f"it has: {', '.join(self.site.taps)}")

    def _propagate(self) -> None:
        """Compute the shapes after what has changed its length."""
        expr, self.resized = self.resized, None
        if expr is None:
            return
        try:
            self.program.propagate()
        except RuntimeError as error:  # a table of positions that ends, say
            reason = str(error).splitlines()[0]
            message = f"`set` of `{self.delta.name}`: the model takes no sequence of this length: {reason}"
            help = "make it shorter with --set; `max_position_embeddings` in config.json is a usual bound"
            fail("E024", message, span=expr.span, help=help)


class _Carrier(_Rewriter):
    """Writes one entry of `carry` at one site."""

    def carry(self) -> Carried:
        value = self.delta.value
        assert value is not None
        self._read([])
        needed = self._needed(value)
        read = {name for part in (value, *(self.delta.let[let] for let in needed)) for name in names_in(part)}
        self._move([self.inputs[name] for name in sorted(read & self.inputs.keys())])
        lowering = Lowering(self.builder, {**self.env, **self.inputs}, self.site.describe())
        for let in needed:
            lowering.env[let] = lowering.lower(self.delta.let[let])
        node = lowering.tensor(value)
        if node not in self.builder.nodes:  # it needs a node of its own: see `Tap.write`
            node = self.builder.call(aten.clone.default, node)
        own = tuple(self.builder.nodes)
        return Carried(self.delta.name, self.site, node, own, self.held.union(own))


def _place(expr: Expr, names: list[str]) -> Any:
    """The first of `names` in `expr`, or the whole of it."""
    found = name_nodes(expr)
    return next((expr.span_of(found[name]) for name in names if name in found), expr.span)


def _sizes(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
