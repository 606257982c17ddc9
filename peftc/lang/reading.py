"""Reads parts of a checked tree into typed values, and says which names an expression may use.

Every function here reports into the `Collector` of its `Reader` and goes on, returning None where there is
nothing to return, so that one run tells every mistake of a file.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from peftc.diagnostics import Collector, PeftcError, did_you_mean
from peftc.lang.expr import name_nodes, parse
from peftc.lang.grammar import Mode
from peftc.lang.rule import Expr, Param, Scalar
from peftc.lang.sites import DIMS, TAPS
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode

RESERVED = {"x": "the delta's input", "h": "the modified representation", "dh": "the delta"}


@dataclass(frozen=True, slots=True)
class Scope:
    """What an expression may name: `static` values and `tensors`; `loose` admits any other name as a static one."""

    static: frozenset[str]
    tensors: frozenset[str] = frozenset()
    loose: bool = False

    def with_tensors(self, *names: str) -> Scope:
        return Scope(self.static, self.tensors | set(names), self.loose)

    def with_static(self, *names: str) -> Scope:
        return Scope(self.static | set(names), self.tensors, self.loose)


@dataclass(slots=True)
class Reader:
    """Turns nodes into expressions and parameters; `words` are the arguments that may be called as ops."""

    collector: Collector
    words: Mapping[str, Scalar] = field(default_factory=dict)

    def expr(self, node: Node | None, mode: Mode = "tensor") -> Expr | None:
        """The expression a scalar holds; None when it is absent or wrong."""
        if not isinstance(node, ScalarNode):
            return None
        text = str(node.value) if isinstance(node.value, bool) else node.text
        try:
            return parse(text, node.inner, exact=node.exact, mode=mode, words=self.words)
        except PeftcError as error:
            self.collector.extend_once(error.diagnostics)
            return None

    def names(self, expr: Expr | None, scope: Scope) -> None:
        """E008 for each name that is not in `scope`, E011 for a tensor where only a static value can be."""
        if expr is None:
            return
        known = scope.static | scope.tensors
        for name, node in name_nodes(expr).items():
            if name not in known and (not scope.loose or name in RESERVED):
                help = _help(name, scope)
                self.collector.error("E008", f"unknown name `{name}`", span=expr.span_of(node), help=help)
        for node in tensors_in_static_places(expr, scope.tensors - scope.static):
            message = f"`{node.id}` is a tensor; here only a static value can be"
            help = "static: numbers, hyperparameters, form arguments, dimensions"
            self.collector.error("E011", message, span=expr.span_of(node), help=help)

    def params(self, node: Node | None, scope: Scope) -> tuple[Param, ...]:
        """The `params:` of a form or a row; sizes and conditions see static names only, and what `init` may name is
        checked in `peftc.lang.inits`."""
        if not isinstance(node, MappingNode):
            return ()
        found = (self._param(key, value, scope) for key, value in node.entries.values())
        return tuple(param for param in found if param is not None)

    def _param(self, key: ScalarNode, node: Node, scope: Scope) -> Param | None:
        sizes, static = (
            node.get("shape") if isinstance(node, MappingNode) else None,
            Scope(scope.static, loose=scope.loose),
        )
        if not isinstance(node, MappingNode) or not isinstance(sizes, SequenceNode):
            return None
        shape = [self.expr(item, "static") for item in sizes.items]
        init, condition = self.expr(node.get("init"), "init"), self.expr(node.get("if"), "static")
        lr = self.expr(node.get("lr"), "static")
        for part in (*shape, condition, lr):
            self.names(part, static)
        if init is None or None in shape:
            return None
        return Param(
            key.text,
            tuple(size for size in shape if size is not None),
            init,
            dtype=word(node.get("dtype")),
            share=word(node.get("share")) or "site",  # pyright: ignore[reportArgumentType] -- the schema checked it
            frozen=value(node.get("frozen")) is True,
            condition=condition,
            lr=lr,
            span=key.span,
        )

    def lets(self, node: Node | None, scope: Scope) -> tuple[dict[str, Expr], Scope]:
        """The `let:` of a form or a row, in order, and the scope with their names: each sees the ones above it."""
        found: dict[str, Expr] = {}
        for name, (_, item) in node.entries.items() if isinstance(node, MappingNode) else ():
            expr = self.expr(item)
            self.names(expr, scope)
            if expr is not None:
                found[name] = expr
            constant = expr is not None and is_static(expr, scope)
            scope = scope.with_static(name) if constant else scope.with_tensors(name)
        return found, scope

    def fresh(self, node: Node | None, what: str, taken: Mapping[str, str]) -> dict[str, str]:
        """Refuse names of `node` that are `taken`, reserved or Python's own (E023, E009); all names, described."""
        described = dict(taken)
        for name, (key, _) in node.entries.items() if isinstance(node, MappingNode) else ():
            if keyword.iskeyword(name):
                message = f"`{name}` is a word of the expression language and cannot be a name"
                self.collector.error("E009", message, span=key.span, help=f"write `{name}_`, say")
            elif name in described or name in RESERVED:
                message = f"`{name}` already names {described.get(name) or RESERVED[name]}"
                self.collector.error("E023", message, span=key.span, help="choose another name")
            described[name] = what
        return described


def _help(name: str, scope: Scope) -> str | None:
    if name in ("true", "false", "none"):
        return f"write `{name.capitalize()}` in an expression"
    if name == "dh":
        return "`dh` is only known in `compose`"
    if not scope.tensors and name in {*RESERVED, *TAPS}:
        return f"`{name}` is a tensor; here stand numbers, hyperparameters, arguments and dimensions"
    near = did_you_mean(name, scope.static | scope.tensors) or ""
    if near.startswith("did"):
        return near
    given = did_you_mean("", (scope.static | scope.tensors - TAPS | {"x"} & scope.tensors) - {*DIMS})
    others = "the site's dimensions" + (" and taps" if scope.tensors else "")
    return f"{given}; and {others}" if given else f"known: {others}"


def tensors_in_static_places(expr: Expr, tensors: Collection[str]) -> Iterator[ast.Name]:
    """Tensor names in conditions, comparisons, // and %, and subscripts."""
    for node in ast.walk(expr.tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.IfExp):
            parts = [node.test]
        elif isinstance(node, (ast.Compare, ast.BoolOp)):
            parts = list(ast.iter_child_nodes(node))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        for part in parts:
            if isinstance(part, ast.Name) and part.id in tensors:
                yield part
            elif isinstance(part, (ast.Slice, ast.Tuple)):
                yield from (n for n in outside_sizes(part) if isinstance(n, ast.Name) and n.id in tensors)


def is_static(expr: Expr, scope: Scope) -> bool:
    """Whether `expr` calls no op and names no tensor, but for the size of one."""
    nodes = list(outside_sizes(expr.tree))
    if any(isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)) for node in nodes):
        return False
    return {node.id for node in nodes if isinstance(node, ast.Name)} <= scope.static


def outside_sizes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree but for calls of `size`, which is a number whatever it is of."""
    queue = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "size":
            continue
        yield node
        queue.extend(ast.iter_child_nodes(node))


def form_scope(
    static: Collection[str], params: Collection[str], taps: Collection[str] = TAPS, *, loose: bool = False
) -> Scope:
    """What expressions of a form may name: static values, parameters, x, h and the taps of the site."""
    known = frozenset(static) | frozenset(DIMS)
    return Scope(known, frozenset({"x", "h", *params, *(tap for tap in taps if tap not in known)}), loose)


def value(node: Node | None) -> Scalar:
    """The value of a scalar node; None for anything else."""
    return node.value if isinstance(node, ScalarNode) else None


def word(node: Node | None) -> str | None:
    """The word a scalar node holds."""
    return node.value if isinstance(node, ScalarNode) and isinstance(node.value, str) else None


def words(node: Node | None) -> list[ScalarNode]:
    """A word or a list of words, as nodes."""
    if isinstance(node, ScalarNode):
        return [node] if isinstance(node.value, str) else []
    items = node.items if isinstance(node, SequenceNode) else ()
    return [item for item in items if isinstance(item, ScalarNode) and isinstance(item.value, str)]
