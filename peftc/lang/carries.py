"""Entries of `carry:`: values that rows read, each computed at every site of a kind, from layer to layer.

    carry:
      start: {at: block, where: {layers: [0]}, params: {D: ...}, value: "linear(x, D)"}
      rung:
        at: block
        from: {below: "rung[layer - 1] or start[0]"}
        params: {W: ...}
        value: "below + linear(out, W)"

An entry modifies nothing. Its expressions read the site's taps by name, and what `from` names; rows and other entries
read its value by `from` in turn, that of any layer. A value is computed where a row needs it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peftc.diagnostics import Collector
from peftc.lang.complaints import shown
from peftc.lang.references import STACKS
from peftc.lang.rewrites import RewriteReader, unchanged
from peftc.lang.rows import spans_of, whole
from peftc.lang.rule import Delta, Form, Reference
from peftc.lang.tree import MappingNode, Node, ScalarNode


@dataclass(slots=True)
class CarryReader(RewriteReader):
    """Reads the entries of `carry:` of one rule file."""

    def carry(self, key: ScalarNode, node: MappingNode) -> Delta | None:
        """The entry as a row with a `value`; None after an error that leaves none."""
        head = self.head(node)
        value = head.reader.expr(node.get("value"))
        head.reader.names(value, head.scope)
        if value is None:
            return None
        self.unread(node, head, [value])
        delta = Delta(
            key.text, head.at, (), "parallel", Form(""), unchanged(key), head.arguments,
            self.where(node.get("where"), self.kinds.common_dims(node)), head.params, head.lets, None,
            whole(node.get("expect")), key.span, spans_of(node), sources=self._sources(node), value=value,
        )  # fmt: skip
        return self.started(delta, head.static)


def check_names(entries: Mapping[str, tuple[ScalarNode, Node]], reader: RewriteReader, rows: Iterable[str]) -> None:
    """E023 for an entry that has the name of a row, of a kind of site or of a stack."""
    rows = {*rows}
    for name, (key, _) in entries.items():
        if name in rows:
            what = "a row of `deltas` or an entry of `rewrite`"
        elif name in STACKS or reader.kinds.is_known(name):
            what = "a stack" if name in STACKS else "a kind of site"
        else:
            continue
        message = f"`{shown(name)}` already names {what}"
        reader.collector.error("E023", message, span=key.span, help="choose another name")


def check_cycles(deltas: Iterable[Delta], collector: Collector) -> None:
    """E051 for entries of `carry` that read each other, or themselves, in one layer."""
    reads = {delta.name: _same_layer(delta) for delta in deltas if delta.value is not None}
    done: set[str] = set()
    for name in reads:
        path: list[str] = []
        _walk(name, reads, path, done, collector)


def _walk(
    name: str, reads: Mapping[str, Mapping[str, Reference]], path: list[str], done: set[str], collector: Collector
) -> None:
    if name in done or name not in reads:
        return
    path.append(name)
    for read, reference in reads[name].items():
        if read in path:
            cycle = " from ".join(f"`{shown(row)}`" for row in [*path[path.index(read) :], read])
            message, help = f"in one layer {cycle}", f"read another layer, as in {read}[layer - 1]"
            collector.error(
                "E051", f"a carried value is computed from itself: {message}", span=reference.span, help=help
            )
        else:
            _walk(read, reads, path, done, collector)
    done.add(path.pop())


def _same_layer(delta: Delta) -> dict[str, Reference]:
    """The carried values that an entry reads of its own layer in any case, by name."""
    first = (source for source in delta.sources.values() if not source.tap)
    return {source.kind: source for source in first if source.index is None and not source.stack}
