"""`same_as` of a test: the other rule, and which of its parameters is which of this rule's.

Parameters have one name on both sides where rows, taps and sites are called alike. `map` says what this rule's rows
(`adapter: lora`) and parameters (`W_down: A`) are called there. Where the modules that hold them differ as well,
parameters of one name are paired in the order of the graph; a wrong pair cannot pass for equal, for values are random.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.lang.library import SUFFIXES
from peftc.lang.loader import load_rule
from peftc.lang.rule import Rule, SameAs

if TYPE_CHECKING:
    from peftc.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Unpaired:
    """Why two plans have not the same parameters."""

    reason: str


def other_rule(same: SameAs, file: str) -> Rule:
    """The rule that a test of the rule in `file` compares with: of the library, or a path from beside that file."""
    is_path = same.rule.endswith(SUFFIXES) or "/" in same.rule or os.sep in same.rule
    return load_rule(Path(file).parent / same.rule if is_path else same.rule, same.hyper)


def pairs(ours: Plan, theirs: Plan, map: Mapping[str, str]) -> dict[str, str] | Unpaired:
    """Our parameters' names to theirs, or why there is no such pairing."""
    if set(ours.trained) != set(theirs.trained):
        apart = sorted(set(ours.trained) ^ set(theirs.trained))[0]
        return Unpaired(f"one of the two trains `{apart}` of the base, the other does not")
    renamed = {name: _renamed(name, map) for name in ours.parameters}
    if set(renamed.values()) != set(theirs.parameters):
        found = _in_order(renamed, list(theirs.parameters))
        if isinstance(found, Unpaired):
            return found
        renamed = found
    for name, other in renamed.items():
        a, b = ours.parameters[name], theirs.parameters[other]
        if a.shape != b.shape:
            return Unpaired(f"`{name}` is {list(a.shape)}, and `{other}` there is {list(b.shape)}")
        if a.frozen != b.frozen:
            return Unpaired(f"`{name}` and `{other}` there do not both train")
    return renamed


def _renamed(name: str, map: Mapping[str, str]) -> str:
    """A parameter's name with its row and its last part as they are called there."""
    owner, _, local = name.rpartition("peftc.")
    row, *middle, last = local.split(".")
    return ".".join([f"{owner}peftc.{map.get(row, row)}", *middle, map.get(last, last)])


def _in_order(renamed: Mapping[str, str], theirs: list[str]) -> dict[str, str] | Unpaired:
    """Pairs of equal last parts, in order."""
    left: dict[str, list[str]] = {}
    for other in theirs:
        left.setdefault(other.rpartition(".")[2], []).append(other)
    found: dict[str, str] = {}
    for name, wanted in renamed.items():
        candidates = left.get(wanted.rpartition(".")[2])
        if not candidates:
            return Unpaired(f"`{name}` has no counterpart `{wanted}` there")
        found[name] = candidates.pop(0)
    rest = [other for others in left.values() for other in others]
    return Unpaired(f"`{rest[0]}` there has no counterpart here") if rest else found
