"""From lines to terms: checks every op and operand of a line at its own token, then builds one variant.

Two steps, because an alternative of `any` is a part of several variants and its mistakes are told once: `check_line`
looks at a line as it is written, `build` at the lines of one variant together.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.grammar import MAX_INT
from peftc.patterns.lines import Line, is_choice
from peftc.patterns.ops import OPERATORS, PATTERN_OPS, WORDS, PatternOp
from peftc.patterns.terms import Call, Leaf, Nearest, Number, Piece, Place, Term, Variant, walk

MAX_TERMS = 64

_SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.MatMult: "@",
}  # fmt: skip
_ADMITTED = "admitted in a pattern: names, numbers, ops, + - * / ** @, any(..), nearest(..), split(..)"


def check_line(line: Line, collector: Collector) -> bool:
    """Report what is outside the grammar of patterns: E007 (op), E009, E011 (construct), E012 (operands)."""
    checker = _Checker(line, collector)
    for name in line.names:
        if name.text[0].isupper():
            help = "a capital is a parameter of the checkpoint; a value starts with a small letter"
            collector.error("E009", f"`{name.text}` is given a value", span=name.span, help=help)
            checker.good = False
    tree = line.expr.tree
    if _is_call_of(tree, "split"):
        checker.split(tree)
    elif len(line.names) > 1:
        help = "several names stand before `split` alone: g, u = split(h)"
        checker.error("E011", "this gives one value", tree, help)
    elif isinstance(tree, (ast.Name, ast.Constant)):
        checker.error("E011", "a line calls an op", tree, "use the name itself where the value is read")
    else:
        checker.term(tree)
    return checker.good


def _is_call_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


@dataclass(slots=True)
class _Checker:
    line: Line
    collector: Collector
    good: bool = True

    def error(self, code: str, message: str, node: ast.AST, help: str) -> None:
        self.collector.error(code, message, span=self.line.expr.span_of(node), help=help)
        self.good = False

    def split(self, node: ast.AST) -> None:
        assert isinstance(node, ast.Call)
        if len(self.line.names) < 2:
            self.error("E012", "`split` gives several values", node.func, "name each: g, u = split(h)")
        if len(node.args) != 1 or node.keywords:
            self.error("E012", f"`split` takes 1 operand, {len(node.args)} given", node, f"split: {WORDS['split']}")
        for argument in node.args:
            self.term(argument)

    def term(self, node: ast.AST) -> None:
        if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
            self.term(node.left)
            self.term(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self.term(node.operand)
        elif isinstance(node, ast.Constant):
            self._number(node)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif not isinstance(node, ast.Name):
            self.error("E011", f"`{ast.unparse(node)}` is not admitted", node, _ADMITTED)

    def _number(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            self.error("E011", f"`{node.value}` is not admitted", node, _ADMITTED)
        elif not abs(node.value) <= MAX_INT:
            self.error("E017", "the number is too large", node, "numbers go up to 2 ** 53")

    def _call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            self.error("E011", "an operand by name is not admitted", keyword, "operands stand in order")
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                self.error("E011", "a star argument is not admitted", argument, _ADMITTED)
            else:
                self.term(argument)
        if is_choice(node):
            if len(node.args) < 2:
                self.error("E012", "`any` chooses among two or more", node, f"any: {WORDS['any']}")
        elif _is_call_of(node, "split"):
            self.error("E011", "`split` stands alone in a line", node.func, f"split: {WORDS['split']}")
        elif _is_call_of(node, "nearest"):
            if len(node.args) != 1 or _ops(node.args[0]) is None:
                self.error("E012", "`nearest` takes the call of an op", node, f"nearest: {WORDS['nearest']}")
        else:
            self._check_ops(node)

    def _check_ops(self, node: ast.Call) -> None:
        names = _op_names(node.func)
        if names is None:
            self.error("E011", "calling anything but an op by name is not admitted", node.func, _ADMITTED)
            return
        for name in names:
            op = PATTERN_OPS.get(name.id)
            if op is None:
                help = did_you_mean(name.id, [*PATTERN_OPS, *WORDS]) or ""
                help = help if help.startswith("did") else "`peftc patterns --ops` lists the ops of patterns"
                self.error("E007", f"unknown op `{name.id}`", name, help)
            elif not op.arity[0] <= len(node.args) <= op.arity[1]:
                low, high = op.arity
                takes = f"{low} operand{'s' if low > 1 else ''}" if low == high else f"{low} to {high} operands"
                self.error("E012", f"`{op.name}` takes {takes}, {len(node.args)} given", node, f"{op.name}: {op.doc}")
            else:
                self._check_optional(node, op)

    def _check_optional(self, node: ast.Call, op: PatternOp) -> None:
        for position, argument in enumerate(node.args):
            optional = argument.end_col_offset in self.line.optional
            if optional and isinstance(argument, ast.Name) and (position < op.arity[0] or op.variadic):
                message = f"`{argument.id}` is never absent from `{op.name}`"
                self.error("E012", message, argument, f"{op.name}: {op.doc}")


def _op_names(func: ast.expr) -> list[ast.Name] | None:
    """The names of an op, or of the ops in any(silu, gelu)."""
    if isinstance(func, ast.Name):
        return [func]
    if is_choice(func):
        assert isinstance(func, ast.Call)
        names = [name for name in func.args if isinstance(name, ast.Name)]
        return names if len(names) == len(func.args) and names else None
    return None


def _ops(node: ast.AST) -> tuple[PatternOp, ...] | None:
    """The ops that a node calls; None where it calls none."""
    if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
        return (PATTERN_OPS[OPERATORS[_SYMBOLS[type(node.op)]]],)
    if isinstance(node, ast.UnaryOp):
        return (PATTERN_OPS["neg"],)
    names = _op_names(node.func) if isinstance(node, ast.Call) else None
    if names is None or any(name.id not in PATTERN_OPS for name in names):
        return None
    return tuple(PATTERN_OPS[name.id] for name in names)


def build(lines: Sequence[Line], outputs: Sequence[Place], collector: Collector) -> Variant | None:
    """One variant of a pattern from lines that `check_line` found good, at least one; None after an error.

    Reports E023 (a name given twice), E072 (read above its line, or made of itself), E017 (too large), E011 (an output
    that is no op).
    """
    builder = _Builder(lines, collector)
    for line in lines:
        builder.add(line)
    names = tuple(place.text for place in outputs if place.text in builder.values)
    if not builder.good:
        return None
    last = tuple(name.text for name in lines[-1].names if name.text != "_")
    variant = Variant(builder.values, names or last)
    if not _outputs_are_ops(variant, lines, collector):
        return None
    count = sum(not isinstance(term, (Leaf, Number)) for term in walk(*builder.values.values()))
    if count > MAX_TERMS:
        message = f"a pattern of {count} ops; the limit is {MAX_TERMS}"
        collector.error("E017", message, span=lines[0].names[0].span, help="match a smaller part of the model")
        return None
    return variant


def _outputs_are_ops(variant: Variant, lines: Sequence[Line], collector: Collector) -> bool:
    """Whether there is an output, and every output is an op: matching starts from them."""
    wrong = [name for name in variant.outputs if not isinstance(variant.values[name], (Call, Piece))]
    if variant.outputs and not wrong:
        return True
    places = [place for line in lines for place in line.names if place.text in wrong] or [lines[-1].names[-1]]
    message = f"`{places[0].text}` may be no op of its own" if wrong else "the last line gives no value a name"
    help = "an output is the value of an op, such as linear(x, W)"
    collector.error("E011", message, span=places[0].span, help=help)
    return False


@dataclass(slots=True)
class _Builder:
    lines: Sequence[Line]
    collector: Collector
    values: dict[str, Term] = field(default_factory=dict)
    good: bool = True

    def add(self, line: Line) -> None:
        for name in line.names:
            if name.text in self.values:
                self._error("E023", f"`{name.text}` is given a value twice", name, "choose another name")
        tree = line.expr.tree
        if _is_call_of(tree, "split"):
            assert isinstance(tree, ast.Call)
            source, parts = self._term(line, tree.args[0]), []
            for index, name in enumerate(line.names):
                parts.append(Piece(source, index, len(line.names), line.place(tree), parts))
                self._give(name, parts[-1])
        else:
            self._give(line.names[0], self._term(line, tree))

    def _give(self, name: Place, term: Term) -> None:
        if name.text != "_":
            self.values[name.text] = term

    def _error(self, code: str, message: str, place: Place, help: str) -> None:
        self.collector.error(code, message, span=place.span, help=help)
        self.good = False

    def _term(self, line: Line, node: ast.AST) -> Term:
        place = line.place(node)
        if isinstance(node, ast.Name):
            return self._named(line, node, place)
        if isinstance(node, ast.Constant):
            return Number(node.value, place)  # pyright: ignore[reportArgumentType] -- check_line saw a number
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return Number(-node.operand.value, place)  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        if _is_call_of(node, "nearest"):
            assert isinstance(node, ast.Call)
            inner = self._term(line, node.args[0])
            assert isinstance(inner, Call)
            return Nearest(inner, place)
        ops = _ops(node)
        assert ops is not None
        operands = {ast.BinOp: ("left", "right"), ast.UnaryOp: ("operand",)}.get(type(node))
        parts = [getattr(node, key) for key in operands] if operands else getattr(node, "args", [])
        return Call(ops, tuple(self._term(line, part) for part in parts), place)

    def _named(self, line: Line, node: ast.Name, place: Place) -> Term:
        if node.id in self.values:
            return self.values[node.id]
        own = [name.text for name in line.names]
        later = [other for other in self.lines if node.id in [name.text for name in other.names]]
        if node.id != "_" and (node.id in own or later):
            circular = node.id in own or any(name in _read(later[0]) for name in own)
            message = f"`{node.id}` is made of itself" if circular else f"`{node.id}` is read above its line"
            self._error(
                "E072", message, place, "lines go from inputs to outputs; a name has its line above its readers"
            )
        return Leaf(node.id, node.end_col_offset in line.optional, place)


def _read(line: Line) -> set[str]:
    return {node.id for node in ast.walk(line.expr.tree) if isinstance(node, ast.Name)}
