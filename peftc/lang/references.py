"""References of `from:`: a tap of another site, by the kind of the site and the layer it is in.

    block[0].x               what enters the first block
    block[layer - 1].out     what leaves the block before this one
    encoder.block[-1].out    what leaves the last block of the encoder
    attention.out            the attention in the same layer
    model.embeddings         the token embeddings
    rung[layer - 1]          what the entry `rung` of `carry` computes in the layer before this one
    rung[layer - 1] or start[0]     the same, and in the first layer what `start` computes there

An index is a static expression over `layer`, `layers` and the hyperparameters; a negative one counts from the end.
Which site a reference names is found by `peftc.planning.select.referred`, for each site of the row.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Container
from dataclasses import dataclass, replace

from peftc.diagnostics import Collector, PeftcError, did_you_mean
from peftc.lang.complaints import shown
from peftc.lang.grammar import check, tree_of
from peftc.lang.kinds import Kinds
from peftc.lang.reading import Reader, Scope
from peftc.lang.rule import Expr, Reference
from peftc.lang.tree import MappingNode, Node, ScalarNode

STACKS = ("encoder", "decoder")
INDEXED = frozenset({"layer", "layers"})
"""What an index may name beside the hyperparameters."""

_HELP = "as in block[0].x, block[layer - 1].out, attention.out or model.embeddings"


def read_sources(
    node: Node | None,
    declared: Collection[str],
    collector: Collector,
    kinds: Kinds,
    carried: Collection[str] = (),
) -> dict[str, Reference]:
    """The references under `from:` by name, `x` for a single one; `carried` are the entries of `carry`.

    Reports E004, E005, E008, E011 and E014.
    """
    if isinstance(node, ScalarNode):
        items = {"x": node}
    elif isinstance(node, MappingNode):
        items = {name: item for name, (_, item) in node.entries.items() if isinstance(item, ScalarNode)}
    else:
        return {}
    found = {name: _ReferenceReader(item, declared, collector, kinds, carried).read() for name, item in items.items()}
    return {name: reference for name, reference in found.items() if reference is not None}


@dataclass(frozen=True, slots=True)
class _ReferenceReader:
    """Reads one reference."""

    node: ScalarNode
    declared: Collection[str]
    collector: Collector
    kinds: Kinds
    carried: Collection[str] = ()

    def read(self) -> Reference | None:
        text = self.node.text.strip()
        exact = self.node.exact and self.node.text.startswith(text)
        try:
            tree = tree_of(text, self.node.inner, exact)
        except PeftcError as error:
            self.collector.extend([replace(d, help=_HELP) if d.code == "E011" else d for d in error.diagnostics])
            return None
        whole = Expr(text, tree, self.node.inner, exact)
        if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.Or):
            found = [self._choice(whole, part, ast.unparse(part)) for part in tree.values]
        else:
            found = [self._choice(whole, tree, text)]
        chain: Reference | None = None
        for reference in reversed(found):
            if reference is None:
                return None
            chain = replace(reference, otherwise=chain)
        return chain

    def _choice(self, whole: Expr, tree: ast.expr, text: str) -> Reference | None:
        """One of the references that `or` joins."""
        parts = _parts(tree, self.carried)
        if parts is None:
            self._no_reference(whole, tree, text)
            return None
        stack, kind, index, attribute = parts
        known = self._words(whole, stack, kind, attribute)
        inner = None if index is None else Expr(whole.text, index, self.node.inner, whole.exact)
        if inner is not None and not self._index(inner):
            return None
        name = kind.attr if isinstance(kind, ast.Attribute) else kind.id
        word, tap = "" if stack is None else stack.id, "" if attribute is None else attribute.attr
        return Reference(text, name, tap, inner, word, whole.span_of(tree)) if known else None

    def _no_reference(self, whole: Expr, tree: ast.expr, text: str) -> None:
        """E008 for what is most like a misspelt name of a carried value, E011 for anything else."""
        name = tree.value if isinstance(tree, ast.Subscript) else tree
        known = isinstance(name, ast.Name) and (name.id in self.carried or self.kinds.is_known(name.id))
        if self.carried and isinstance(name, ast.Name) and not known:
            message, help = f"`carry` has no entry `{shown(name.id)}`", did_you_mean(name.id, self.carried)
            self.collector.error("E008", message, span=whole.span_of(name), help=help)
            return
        message = f"`{shown(text)}` is no reference to a tap" + (" or to a carried value" if self.carried else "")
        self.collector.error("E011", message, span=whole.span_of(tree), help=_HELP)

    def _words(
        self, whole: Expr, stack: ast.Name | None, kind: ast.Name | ast.Attribute, tap: ast.Attribute | None
    ) -> bool:
        """Whether the stack, the kind of site and the tap are words of the language; E005 and E004 where not."""
        if stack is not None and stack.id not in STACKS:
            message = f"unknown stack `{shown(stack.id)}`"
            self.collector.error("E005", message, span=whole.span_of(stack), help=did_you_mean(stack.id, STACKS))
            return False
        name = kind.attr if isinstance(kind, ast.Attribute) else kind.id
        if tap is None:
            return True
        if name in self.carried:
            message, help = f"`{name}` is a value, and has no tap `{shown(tap.attr)}`", f"write `{name}` alone"
            self.collector.error("E004", message, span=whole.span_of(_tail(whole, tap)), help=help)
            return False
        taps = self.kinds.taps(name)
        if taps is None and name in self.kinds.written:
            return False  # a pattern whose own mistake is told
        if taps is None:
            place = _tail(whole, kind) if isinstance(kind, ast.Attribute) else kind
            message = f"unknown site `{shown(name)}`"
            self.collector.error("E005", message, span=whole.span_of(place), help=did_you_mean(name, self.kinds.names))
            return False
        if tap.attr not in taps:
            message, help = f"`{name}` has no tap `{shown(tap.attr)}`", did_you_mean(tap.attr, taps)
            self.collector.error("E004", message, span=whole.span_of(_tail(whole, tap)), help=help)
            return False
        return True

    def _index(self, expr: Expr) -> bool:
        """Whether the index is a static expression over known names."""
        collector = Collector()
        check(expr, "static", {}, collector)
        if not collector.errors:
            Reader(collector).names(expr, Scope(frozenset({*self.declared, *INDEXED})))
        value = expr.tree.value if isinstance(expr.tree, ast.Constant) else 0
        if not collector.errors and (isinstance(value, bool) or not isinstance(value, int)):
            message = f"`{shown(ast.unparse(expr.tree))}` is no layer"
            collector.error("E014", message, span=expr.span_of(expr.tree), help="layers are whole numbers from 0 on")
        self.collector.extend(collector.diagnostics)
        return not collector.errors


_Parts = tuple[ast.Name | None, ast.Name | ast.Attribute, ast.expr | None, ast.Attribute | None]


def _parts(tree: ast.expr, carried: Container[str]) -> _Parts | None:
    """The stack, kind, index and tap of `stack.kind[index].tap`, or of `stack.carried[index]`; None for all else."""
    value, index = (tree.value, tree.slice) if isinstance(tree, ast.Subscript) else (tree, None)
    if not isinstance(index, (ast.Slice, ast.Tuple)):
        if isinstance(value, ast.Name) and value.id in carried:
            return None, value, index, None
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.attr in carried:
            return value.value, value, index, None
    if not isinstance(tree, ast.Attribute):
        return None
    site, index = tree.value, None
    if isinstance(site, ast.Subscript):
        site, index = site.value, site.slice
        if isinstance(index, (ast.Slice, ast.Tuple)):
            return None
    if isinstance(site, ast.Name):
        return None, site, index, tree
    if isinstance(site, ast.Attribute) and isinstance(site.value, ast.Name):
        return site.value, site, index, tree
    return None


def _tail(whole: Expr, node: ast.Attribute) -> ast.AST:
    """A node that stands where the last word of an attribute stands."""
    end = node.end_col_offset or len(whole.text)
    start = end - len(node.attr)
    return ast.Name(node.attr, lineno=1, col_offset=start, end_lineno=1, end_col_offset=end)
