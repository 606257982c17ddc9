"""Forms of a rule's own: those under `forms:`, which are also where included files of forms end.

forms:
  gated: {params: {g: {shape: [d_out], init: zeros}}, dh: g * x}
deltas:
  a: {at: ffn, modify: out, form: gated}
"""

from __future__ import annotations

from peftc.diagnostics import Collector
from peftc.lang.extensions import LIBRARY
from peftc.lang.forms import form_of
from peftc.lang.library import catalogue
from peftc.lang.rule import Form
from peftc.lang.tree import MappingNode, Node


def local_forms(node: Node | None, collector: Collector) -> dict[str, Form | None]:
    """The forms under `forms:` of a rule by name; None for one whose own mistakes are told."""
    found: dict[str, Form | None] = {}
    for name, (key, body) in node.entries.items() if isinstance(node, MappingNode) else ():
        if LIBRARY in catalogue("forms").origins.get(name, []):  # one of another package gives way, installed or not
            message = f"`{name}` already names a form of the library"
            collector.error("E023", message, span=key.span, help="choose another name, or use the library's")
        found[name] = None
        if isinstance(body, MappingNode):
            before = len(collector.errors)
            form = form_of(body, name, body.span.file, collector)
            found[name] = form if len(collector.errors) == before else None
    return found
