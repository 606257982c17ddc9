"""The rule of an imported adapter, as YAML: one row for each set of numbers, at exactly the adapter's modules.

deltas:
  lora:
    at: linear
    where: {path: [model.layers.*.self_attn.q_proj]}
    modify: out
    form: low_rank
    with: {r: 8, alpha: 16}
    compose: h + (alpha / r) * dh
    expect: 2
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from peftc.interop.base import Base
from peftc.interop.names import shortened
from peftc.interop.table import Layer, Method, methods
from peftc.ir.sites import Site


@dataclass(frozen=True, slots=True)
class Row:
    """A row to be: a layer of the table, its numbers, and the sites that it is for."""

    layer: Layer
    values: Mapping[str, Any]
    sites: tuple[Site, ...]
    modules: Mapping[str, Any] = field(default_factory=dict)
    """The adapter's module for the path of each site."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of its sites."""
        return list(dict.fromkeys([self.layer.at, *(site.kind for site in self.sites)]))


def rule_text(
    method: Method, rows: Mapping[str, Row], options: Mapping[str, Any], trained: Iterable[str], base: Base
) -> str:
    """The text of the rule, which also trains the parameters `trained` of the base."""
    words = {name: choice[str(bool(options.get(choice["option"]))).lower()] for name, choice in method.words.items()}
    rule: dict[str, Any] = {"peftc": 1, "name": method.rule, "doc": f"{method.doc}, from a PEFT adapter."}
    rule["paper"] = method.paper
    hyper: dict[str, Any] = {}
    deltas = {name: _row(name, row, words, hyper, base.program.sites) for name, row in rows.items()}
    rule |= {"hyper": hyper} if hyper else {}
    rule |= {"deltas": deltas} if deltas else {}
    globs = shortened(trained, base.parameters)
    rule |= {"train": globs} if globs else {}
    return yaml.dump(rule, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def layer_text(peft_type: str, index: int, flags: Mapping[str, bool], listed: str = "") -> str:
    """A rule with one row, a layer of the table: its expressions are those of an import, its numbers mean nothing.

    `listed` is what the row calls a list of numbers.
    """
    method = methods()[peft_type]
    layer = method.layers[index]
    words = {name: choice[str(flags[choice["option"]]).lower()] for name, choice in method.words.items()}
    numbers = {
        name: (0,) if isinstance(entry, Mapping) and "indices" in entry else 1 for name, entry in layer.values.items()
    }
    hyper: dict[str, Any] = {}
    row = _row(method.rule, Row(layer, numbers, ()), words, hyper, (), listed)
    rule = {"peftc": 1, "name": method.rule, "hyper": hyper, "deltas": {method.rule: {**row, "where": {}}}}
    return yaml.dump(rule, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: a rule says everything where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _row(
    name: str, row: Row, words: Mapping[str, str], hyper: dict[str, Any], sites: Sequence[Site], given: str = ""
) -> dict[str, Any]:
    """A row as it is written; `given` is what it calls a list of numbers, where not after its own name."""
    kinds = row.kinds
    paths = {site.path for site in sites if site.kind in kinds}
    found: dict[str, Any] = {"at": kinds[0] if len(kinds) == 1 else kinds}
    if row.layer.at != "model":
        found["where"] = {"path": shortened((site.path for site in row.sites), paths)}
    listed = {key: value for key, value in row.values.items() if isinstance(value, tuple)}  # a list is no argument
    names = {key: given or f"{key}_{name}" for key in listed}
    hyper |= {names[key]: {"default": list(value)} for key, value in listed.items()}
    found |= {key: _filled(value, {**words, **names}) for key, value in row.layer.row.items()}
    numbers = {key: value for key, value in row.values.items() if key not in listed}
    if numbers or "with" in found:
        found["with"] = {**numbers, **found.pop("with", {})}
    found["expect"] = len(row.sites)
    return found


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, words) for inner in value]
    return re.sub(r"\{(\w+)\}", lambda match: words[match[1]], value) if isinstance(value, str) else value
