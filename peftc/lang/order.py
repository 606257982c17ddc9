"""The order of rows: that of the file, but for what `before` and `after` ask. Entries of `rewrite` follow the rows.

Several deltas on one tap are composed one after the other, so their order is part of what a rule computes.

    deltas:
      scale: {at: ffn, modify: out, form: gain, insert: sequential, after: lora}
      lora:  {at: ffn, modify: out, form: low_rank}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.complaints import shown
from peftc.lang.reading import words
from peftc.lang.tree import MappingNode, Node, ScalarNode

Wishes = dict[str, dict[str, ScalarNode]]
"""For each row, the rows that must come before it, each with the word that asks for it."""


def ordered(rows: Mapping[str, Node], collector: Collector) -> list[str]:
    """The names of `rows` in the order in which they are applied: of those that may come next, the first of the file.

    E051 for a name that is no other row and for rows that wait for each other.
    """
    wishes = _wishes(rows, collector)
    waiting = {name: set(firsts) for name, firsts in wishes.items()}
    done: list[str] = []
    while waiting:
        ready = next((name for name, firsts in waiting.items() if not firsts), None)
        if ready is None:
            _tell_cycle(waiting, wishes, collector)
            return list(rows)
        del waiting[ready]
        for firsts in waiting.values():
            firsts.discard(ready)
        done.append(ready)
    return done


def _wishes(rows: Mapping[str, Node], collector: Collector) -> Wishes:
    found: Wishes = {name: {} for name in rows}
    for name, row in rows.items():
        for key in ("before", "after"):
            for item in words(row.get(key)) if isinstance(row, MappingNode) else ():
                if item.text not in rows or item.text == name:
                    message = f"`{shown(item.text)}` is the row itself" if item.text == name else None
                    message = message or f"`{key}` names no row: `{shown(item.text)}`"
                    help = did_you_mean(item.text, rows.keys() - {name}) or "the rule has no other row"
                    collector.error("E051", message, span=item.inner, help=help)
                else:
                    first, then = (name, item.text) if key == "before" else (item.text, name)
                    found[then].setdefault(first, item)
    return found


def _tell_cycle(waiting: Collection[str], wishes: Wishes, collector: Collector) -> None:
    """E051 for one cycle among the rows that are `waiting`, each for another of them."""
    name = next(iter(waiting))
    path: list[str] = []
    while name not in path:
        path.append(name)
        name = next(first for first in wishes[name] if first in waiting)
    cycle = path[path.index(name) :]
    told = " after ".join(f"`{shown(row)}`" for row in (*cycle, cycle[0]))
    span = wishes[cycle[-1]][cycle[0]].inner
    collector.error("E051", f"rows wait for each other: {told}", span=span, help="take one of the wishes out")
