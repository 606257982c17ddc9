"""The grammar of rule expressions: which Python syntax is admitted, and how ops are called.

`tree_of` turns text into an `ast` tree within limits of length, depth and characters; `check` reports every part
of a tree that is outside the grammar, each at its own token. Nothing here knows which names exist.
"""

from __future__ import annotations

import ast
import warnings
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from peftc.diagnostics import Collector, Span, did_you_mean, fail
from peftc.lang.arguments import check_arguments
from peftc.lang.extensions import extension_ops
from peftc.lang.ops import INIT_OPS, INITS, OPS, Op
from peftc.lang.rule import Expr, Scalar
from peftc.lang.sites import COMPOSITIONS

MAX_LENGTH = 1000
MAX_DEPTH = 40
MAX_EXPONENT = 64
MAX_INT = 2**53

Mode = Literal["tensor", "static", "init"]
"""`tensor`: dh, let, compose. `static`: shape, if. `init`: as `tensor`, with initialisers and ops of their own."""

STATIC_CALLS = {
    "min": Op("min", (2, 8), "the smallest of its arguments"),
    "max": Op("max", (2, 8), "the largest of its arguments"),
    "len": Op("len", (1, 1), "how many numbers a list holds: len(ids)"),
}
_ADMITTED = {
    "tensor": "admitted: + - * / @ **, numbers, names, ops, .T, [slices], and over static values // %, `a if c else b`,"
    " comparisons, and/or/not",
    "static": "admitted here: + - * / // % **, numbers, names, min, max, len, comparisons, and/or/not, `a if c else b`",
    "init": "admitted here: a number, one of " + ", ".join(sorted(INITS)) + ", or an expression over the weight",
}
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.FloorDiv: "//", ast.Mod: "%"}
_COMPARE = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_CALLED: dict[type[ast.AST], str] = {
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: "an assignment `:=`",
    ast.Starred: "a star argument",
    ast.Dict: "a dictionary",
    ast.Set: "a set",
    ast.Tuple: "a tuple",
    ast.Await: "await",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
    ast.Slice: "a slice",
    ast.List: "a list",
}


def check(expr: Expr, mode: Mode, words: Mapping[str, Scalar], collector: Collector) -> None:
    """Report what is outside the grammar: E011 (construct), E007 (op), E012 (arguments), E017 (numbers)."""
    _Checker(expr, mode, words, collector).node(expr.tree)


def tree_of(source: str, span: Span | None, exact: bool) -> ast.expr:
    """The syntax tree of `source`, its size checked before anything walks it."""
    if len(source) > MAX_LENGTH:
        message = f"an expression of {len(source)} characters; the limit is {MAX_LENGTH}"
        fail("E017", message, span=span, help="name parts under `let:`")
    place = Expr(source, ast.Constant(None), span, exact)
    for index, char in enumerate(source):
        if not (" " <= char <= "~") or char == "#":
            at = _token(place, index, index + 1)
            fail("E011", f"`{char}` is not admitted in an expression", span=at, help="use ASCII names and operators")
    if not source:
        fail("E011", "an expression is missing", span=span, help="as in `h + s * dh`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source, mode="eval").body
    except (RecursionError, MemoryError):
        fail("E017", "the expression is nested too deep", span=span, help="name parts under `let:`")
    except SyntaxError as error:
        reason, at = error.msg or "", max(0, min((error.offset or 1) - 1, len(source)))
        if "too many nested" in reason:
            fail("E017", "the expression is nested too deep", span=span, help="name parts under `let:`")
        for symbol, word in (("&&", "and"), ("||", "or")):
            if symbol in source:
                at = source.index(symbol)
                fail("E011", f"`{symbol}` is not admitted", span=_token(place, at, at + 2), help=f"write `{word}`")
        if "was never closed" in reason:
            help = "inside YAML's `{ }` and `[ ]`, quote an expression that holds a comma"
            fail("E011", f"`{source[at : at + 1]}` is never closed", span=_token(place, at, at + 1), help=help)
        fail("E011", "this is not an expression", span=_token(place, at, at + 1), help=_syntax_help(source, at))
    except ValueError as error:  # an integer literal beyond Python's digit limit
        fail("E017", f"the expression cannot be read: {error}", span=span)
    _check_depth(tree, span)
    return tree


def _syntax_help(source: str, at: int) -> str:
    assigns = "=" in source[at : at + 2] and "==" not in source[at : at + 2]
    return "give the value alone: `h + dh`, not `h = h + dh`" if assigns else "as in `h + s * dh`"


def _check_depth(tree: ast.AST, span: Span | None) -> None:
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    fail("E017", f"the expression is nested deeper than {MAX_DEPTH} levels", span=span, help="name parts under `let:`")


def _token(expr: Expr, start: int, end: int) -> Span | None:
    """The place of characters [start, end) of an expression that has no tree yet."""
    return expr.span_of(ast.Name("_", lineno=1, end_lineno=1, col_offset=start, end_col_offset=end))


@dataclass(slots=True)
class _Checker:
    """Walks a tree and reports everything outside the grammar."""

    expr: Expr
    mode: Mode
    words: Mapping[str, Scalar]
    collector: Collector

    def _refuse(self, node: ast.AST, what: str | None = None) -> None:
        what = what or _CALLED.get(type(node), f"`{ast.unparse(node)}`" if isinstance(node, ast.expr) else "this")
        span = self.expr.span_of(node)
        self.collector.error("E011", f"{what} is not admitted", span=span, help=_ADMITTED[self.mode])

    def node(self, node: ast.AST) -> None:
        if isinstance(node, ast.Constant):
            self._constant(node)
        elif isinstance(node, ast.BinOp):
            self._binary(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            self.node(node.operand)
        elif isinstance(node, (ast.BoolOp, ast.IfExp)):
            for child in node.values if isinstance(node, ast.BoolOp) else (node.test, node.body, node.orelse):
                self.node(child)
        elif isinstance(node, ast.Compare):
            self._compare(node)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Attribute) and self.mode != "static":
            self._attribute(node)
        elif isinstance(node, ast.Subscript) and self.mode != "static":
            self._subscript(node)
        elif isinstance(node, ast.UnaryOp):
            self._refuse(node, f"a leading `{'+' if isinstance(node.op, ast.UAdd) else '~'}`")
        elif not isinstance(node, ast.Name):
            self._refuse(node)
        elif self.mode == "init" and node.id in INITS:
            check_arguments(self.expr, node, INITS[node.id], self.collector)

    def _operand(self, node: ast.expr) -> None:
        """A static value, which may be a word."""
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            self.node(node)

    def _constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, str):
            self._refuse(node, "a word")
        elif not (value is None or isinstance(value, (bool, int, float))):
            self._refuse(node)
        elif isinstance(value, (int, float)) and not abs(value) <= (MAX_INT if isinstance(value, int) else 1e300):
            help = "numbers go up to 2 ** 53, or 1e300 with a point"
            self.collector.error("E017", "the number is too large", span=self.expr.span_of(node), help=help)

    def _binary(self, node: ast.BinOp) -> None:
        matmul = isinstance(node.op, ast.MatMult) and self.mode != "static"
        if not matmul and type(node.op) not in _BINARY:
            self._refuse_operator(node)
            return
        self.node(node.left)
        self.node(node.right)
        right = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
        power = right.value if isinstance(node.op, ast.Pow) and isinstance(right, ast.Constant) else 0
        if isinstance(power, (int, float)) and abs(power) > MAX_EXPONENT:
            message, help = f"an exponent beyond {MAX_EXPONENT}", "for x > 0, exp(k * log(x)) is the same"
            self.collector.error("E017", message, span=self.expr.span_of(right), help=help)

    def _refuse_operator(self, node: ast.BinOp) -> None:
        start, end = node.left.end_col_offset or 0, node.right.col_offset
        between = self.expr.text[start:end]
        symbol = between.strip("() ")
        start += between.index(symbol)
        span = _token(self.expr, start, start + len(symbol))
        help = "a power is written `**`" if symbol == "^" else _ADMITTED[self.mode]
        self.collector.error("E011", f"`{symbol}` is not admitted", span=span, help=help)

    def _compare(self, node: ast.Compare) -> None:
        for operator in node.ops:
            if not isinstance(operator, _COMPARE):
                self._refuse(node, "`is` or `in`")
                return
        for child in (node.left, *node.comparators):
            self._operand(child)

    def _attribute(self, node: ast.Attribute) -> None:
        if node.attr != "T":
            self._refuse(node, f"`.{node.attr}`")
        else:
            self.node(node.value)

    def _subscript(self, node: ast.Subscript) -> None:
        self.node(node.value)
        index = node.slice
        for part in index.elts if isinstance(index, ast.Tuple) else (index,):
            if isinstance(part, ast.Slice):
                for bound in (part.lower, part.upper):
                    if bound is not None:
                        self.node(bound)
                if part.step is not None:
                    self._refuse(part.step, "a step")
            else:
                self.node(part)

    def _call(self, node: ast.Call) -> None:
        if not isinstance(node.func, ast.Name):
            self._refuse_callee(node.func)
            return
        op = self._op(node, node.func.id)
        arguments = list(node.args)
        if self.mode == "init" and op is not None and op is INITS.get(op.name):  # a random draw takes numbers
            _Checker(self.expr, "static", self.words, self.collector).each(arguments)
            arguments = []
        for position, argument in enumerate(arguments):
            self._argument(op, position, argument)
        for keyword in node.keywords:
            if keyword.arg is None:
                self._refuse(keyword, "a star argument")
            else:
                self.node(keyword.value)
        if op is not None and not any(isinstance(a, ast.Starred) for a in node.args):
            check_arguments(self.expr, node, op, self.collector)

    def _argument(self, op: Op | None, position: int, argument: ast.expr) -> None:
        spec = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        if spec and op is not None and op.name == "einsum" and position == 0:
            return
        if self.mode == "init" and op is INIT_OPS["load"]:
            self._load_argument(position, argument)
        elif isinstance(argument, ast.List) and self.mode != "static":
            self.each(argument.elts)
        else:
            self.node(argument)

    def _load_argument(self, position: int, argument: ast.expr) -> None:
        """A hyperparameter, which holds the place, and `row.param`."""
        named = isinstance(argument, ast.Attribute) and isinstance(argument.value, ast.Name)
        if not (named if position else isinstance(argument, ast.Name)):
            help = "load(d, row.param): d is a hyperparameter, and --set d=DIR says where the stored delta lies"
            what = "this" if position else "a place that is written in the rule"
            self.collector.error("E011", f"{what} is not admitted", span=self.expr.span_of(argument), help=help)

    def _refuse_callee(self, func: ast.expr) -> None:
        if isinstance(func, ast.Attribute):
            help = f"write `{func.attr}(...)`" if func.attr in OPS else "ops are called by name: relu(x)"
            self.collector.error("E011", "a method call is not admitted", span=self.expr.span_of(func), help=help)
        else:
            self._refuse(func, "calling anything but an op by name")

    def _op(self, node: ast.Call, name: str) -> Op | None:
        """The op that is called; None after an error, or where only the word's value will tell."""
        known = _CALLS[self.mode]
        if self.mode != "static" and isinstance(self.words.get(name), str):
            return OPS.get(str(self.words[name]))
        clash = extension_ops().clash(name, "op") if self.mode != "static" else None
        if clash is not None:
            self.collector.error(clash.code, clash.message, span=self.expr.span_of(node.func), help=clash.help)
            return None
        if name not in known:
            self._refuse_op(node, name, known)
        return known.get(name)

    def _refuse_op(self, node: ast.Call, name: str, known: Mapping[str, Op]) -> None:
        span, help = self.expr.span_of(node.func), _ADMITTED[self.mode]
        elsewhere = {
            "an op for tensors, not for sizes": OPS,
            "only for sizes and conditions": STATIC_CALLS,
            "only for initial values, under `init`": INIT_OPS,
        }
        for place, table in elsewhere.items():
            if name in table:
                help = help if self.mode == "static" else "`peftc ops` lists the ops for tensors"
                self.collector.error("E011", f"`{name}` is {place}", span=span, help=help)
                return
        callable_words = [] if self.mode == "static" else [w for w, value in self.words.items() if value in OPS]
        near = did_you_mean(name, [*known, *callable_words]) or ""
        if name in ("x", "h", "dh") or isinstance(self.words.get(name), (int, float)):
            help = f"`{name}` is no op: to multiply, write `{name} * ...`"
        elif name in COMPOSITIONS:
            help = f"`{name}` is a composition by itself: compose: {name}"
        else:
            help = near if near.startswith("did") or self.mode == "static" else "`peftc ops` lists the ops there are"
        self.collector.error("E007", f"unknown op `{name}`", span=span, help=help)
        self.collector.extend_once(extension_ops().problems if self.mode != "static" else ())

    def each(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.node(node)


_CALLS: dict[str, Mapping[str, Op]] = {
    "tensor": OPS,
    "static": STATIC_CALLS,
    "init": ChainMap({}, INIT_OPS, OPS, INITS),  # pyright: ignore[reportArgumentType] -- read alone
}
