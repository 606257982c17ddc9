"""How a row uses its form: what the form needs, which arguments it has, which words it calls, where it can stand."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from peftc.diagnostics import Collector, Span, did_you_mean
from peftc.lang.arguments import count
from peftc.lang.complaints import shown
from peftc.lang.expr import calls_in, name_nodes
from peftc.lang.extensions import extension_ops
from peftc.lang.forms import expressions, needs
from peftc.lang.ops import OPS
from peftc.lang.reading import value
from peftc.lang.rule import Delta, Expr, Form, Hyper, Param, Scalar
from peftc.lang.sites import SERIES, SITES, TAPS
from peftc.lang.tree import MappingNode


@dataclass(frozen=True, slots=True)
class FormUse:
    """A form in the row `node`, with the row's `with:` as `arguments`."""

    node: MappingNode
    form: Form
    arguments: Mapping[str, Scalar | Expr]
    hypers: Mapping[str, Hyper]
    declared: frozenset[str]
    collector: Collector
    sites: Mapping[str, tuple[str, ...]]
    """The kinds of sites in the row's `at`, each with its taps."""

    def check(self, params: set[str], read_by_row: set[str]) -> None:
        """Report what does not fit; `params` are the row's own, `read_by_row` names in its other expressions."""
        if self.form.name:
            self._check_needs(params)
        self._check_input(read_by_row)
        self._check_arguments(read_by_row)
        self._check_words()

    def _check_needs(self, params: set[str]) -> None:
        """E008 for each name the library form reads that nothing here gives, E004 for a tap a site has not."""
        span = self.node.entries["form"][1].span
        for name in sorted(needs(self.form).keys() - self.declared - self.arguments.keys() - params):
            if name not in TAPS:
                message = f"form `{self.form.name}` needs `{name}`"
                help = f"give it under `hyper:`, or in the row as `with: {{{name}: ...}}`"
                self.collector.error("E008", message, span=span, help=help)
            for site in (site for site, taps in self.sites.items() if name in TAPS and name not in taps):
                message = f"form `{self.form.name}` reads the tap `{name}`, which {site} has not"
                self.collector.error("E004", message, span=span, help=f"taps: {', '.join(self.sites[site])}")

    def _check_input(self, read_by_row: set[str]) -> None:
        """E004 where the row reads x, says not what it is, and is at a pattern that has no tap `x`."""
        read = {name for expr in expressions(self.form) for name in name_nodes(expr)} | read_by_row
        given = self.node.get("insert")
        if "x" not in read or "from" in self.node.entries or (given is not None and value(given) != "parallel"):
            return
        for site, taps in self.sites.items():
            if site not in SITES and "x" not in taps:
                message = f"the row reads `x`, and `{site}` has no tap of that name"
                help = f"say with `insert` which tap it is: {', '.join(taps)}; or sequential, for h"
                self.collector.error("E004", message, span=self.node.entries["form"][1].span, help=help)

    def _check_arguments(self, read_by_row: set[str]) -> None:
        """E003 for each name under `with:` that neither the form nor the row reads."""
        read = {name for expr in expressions(self.form) for name in (*name_nodes(expr), *calls_in(expr))} | read_by_row
        offered = {*self.form.args, *(needs(self.form).keys() - TAPS)}
        given = self.node.get("with")
        for name, (key, _) in given.entries.items() if isinstance(given, MappingNode) else ():
            if name not in self.form.args and name not in read - self._own():
                message = f"the form has no argument `{shown(name)}`"
                help = did_you_mean(name, offered) or "it takes none"
                self.collector.error("E003", message, span=key.span, help=help)

    def _own(self) -> set[str]:
        """Names the form defines, which `with:` cannot give."""
        return {param.name for param in self.form.params} | {*self.form.let, "x", "h"}

    def _check_words(self) -> None:
        """E007 and E012 for words that the form calls: the value is from `with`, a hyperparameter or the form."""
        given_names = {*self.form.args, *self.arguments, *self.hypers}
        for name, node in _calls(expressions(self.form)).items():
            if name not in given_names:
                continue
            for given, span in self._resolved(name):
                self._check_word(name, len(node.args), given, span)

    def _check_word(self, name: str, arguments: int, given: Scalar, span: Span | None) -> None:
        """The called `name` stands for `given`, which must be an op that takes so many `arguments`."""
        if not isinstance(given, str):
            if name not in OPS:
                message = f"`{name}` is called, but is {str(given).lower()} and not the name of an op"
                self.collector.error("E007", message, span=span, help="as in f: relu; `peftc ops` lists the ops")
            return
        op, clash = OPS.get(given), extension_ops().clash(given, "op")
        if clash is not None:
            self.collector.error(clash.code, clash.message, span=span, help=clash.help)
        elif op is None:
            known = [op.name for op in OPS.values() if op.arity == (1, 1)]
            message = f"unknown op `{shown(given)}`"
            self.collector.error("E007", message, span=span, help=did_you_mean(given, known))
            self.collector.extend_once(extension_ops().problems)
        elif not op.arity[0] <= arguments <= op.arity[1]:
            message = f"`{op.name}` takes {count(op)}; the form calls `{name}` with {arguments}"
            self.collector.error("E012", message, span=span, help=f"{op.name}: {op.doc}")

    def _resolved(self, name: str) -> list[tuple[Scalar, Span | None]]:
        """The values of a called name (several where they differ between layers): with > hyper > the form's default."""
        given, span = self.arguments.get(name), self.node.key("form").span
        if name in self.arguments:
            items = self.node.get("with")
            span = items.entries[name][1].span if isinstance(items, MappingNode) else span
            if not isinstance(given, Expr):
                return [(given, span)]
            name = given.tree.id if isinstance(given.tree, ast.Name) else ""
        if name in self.hypers:
            hyper = self.hypers[name]
            return [(hyper.value, hyper.span), *((given.value, given.span) for given in hyper.layers)]
        form = self.node.get("form")
        written = form.get("args") if isinstance(form, MappingNode) else None
        if isinstance(written, MappingNode) and name in written.entries:
            span = written.entries[name][1].span
        return [(self.form.args.get(name), span)]


def _calls(exprs: list[Expr]) -> dict[str, ast.Call]:
    """The names that are called, each with its first call."""
    found: dict[str, ast.Call] = {}
    for node in (node for expr in exprs for node in ast.walk(expr.tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.setdefault(node.func.id, node)
    return found


def check_composition(delta: Delta, collector: Collector) -> None:
    """E024: gate, prepend, attend and lower each fit one kind of row."""
    attends, named = delta.form.attend is not None, delta.compose.text
    heads = delta.at == ("attention",) and delta.modify == ("heads",)
    if attends and not heads and delta.at:
        message = "a form with `attend` stands only `at: attention` with `modify: heads`"
        help = "use a form that computes `dh`, such as `bottleneck`, at other places"
        collector.error("E024", message, span=delta.span_at("modify"), help=help)
    elif named == "gate" and not attends:
        message = "`gate` weighs two attentions and needs a form with `attend`"
        help = "use form `prefix`, or write the gate as an expression"
        collector.error("E024", message, span=delta.compose.span, help=help)
    elif named == "prepend" and (delta.at, delta.modify) != (("model",), ("embeddings",)):
        message = "`prepend` stands only `at: model` with `modify: embeddings`"
        collector.error("E024", message, span=delta.compose.span, help="to add dh to h write `h + dh`")
    elif set(delta.modify) & {*SERIES}:
        tap = next(tap for tap in delta.modify if tap in SERIES)
        message = f"`{tap}` may be several values, and a row changes one"
        collector.error(
            "E024",
            message,
            span=delta.span_at("modify"),
            help=f"as in rewrite: {{a: {{at: model, set: {{{tap}: ...}}}}}}",
        )
    elif named == "prepend" and delta.sources:
        span = next(iter(delta.sources.values())).span
        message, help = "a prompt is put before the model reads anything", "take `from` out"
        collector.error("E024", message, span=span, help=help)
    if delta.lower is not None and not attends:
        help = "leave `lower` out: this form is written into the graph as it is"
        collector.error("E024", "`lower` is for forms with `attend`", span=delta.span_at("lower"), help=help)


def size_names(param: Param) -> dict[str, bool]:
    """The names in value position of a parameter's shape; True for one that is a size by itself."""
    found: dict[str, bool] = {}
    for size in param.shape:
        nodes: list[ast.AST] = [size.tree]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.Name):
                found[node.id] = found.get(node.id, False) or node is size.tree
            elif isinstance(node, ast.IfExp):
                nodes += [node.body, node.orelse]
            elif isinstance(node, ast.Call):
                nodes += node.args
            elif not isinstance(node, ast.Compare):
                nodes += ast.iter_child_nodes(node)
    return found
