"""The long form of every code: what it means, why it is so, a wrong and a right example.

The table is `codes.yaml` beside this module; a code is never given a second meaning.

    >>> ENTRIES["E012"].title
    'wrong number of arguments of an op'
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import yaml

from peftc.diagnostics import did_you_mean, fail


@dataclass(frozen=True, slots=True)
class Entry:
    """One code. `wrong` and `right` are texts of the kind `example`."""

    code: str
    title: str
    text: str
    wrong: str
    right: str
    example: str = "rule"
    """`rule`: a whole rule file. `model`: a rule that only a model tells to be wrong. `command`: what is typed."""

    def render(self) -> str:
        lines = [f"{self.code}: {self.title}", "", self.text.rstrip(), "", "Wrong:", ""]
        lines += [f"    {line}".rstrip() for line in self.wrong.splitlines()]
        lines += ["", "Right:", "", *(f"    {line}".rstrip() for line in self.right.splitlines())]
        return "\n".join(lines)


class _Entries(Mapping[str, Entry]):
    """The table, read when it is first asked."""

    def __getitem__(self, code: str) -> Entry:
        return _read()[code]

    def __iter__(self) -> Iterator[str]:
        return iter(_read())

    def __len__(self) -> int:
        return len(_read())


ENTRIES: Mapping[str, Entry] = _Entries()


def explain(code: str) -> Entry:
    """The entry of a code, in either case. Raises `PeftcError` E044 for one that does not exist."""
    found = ENTRIES.get(code.upper())
    if found is None:
        known = did_you_mean(code.upper(), ENTRIES) or ""
        help = known if known.startswith("did") else "`peftc explain` lists the codes"
        fail("E044", f"there is no code `{code[:40]}`", help=help)
    return found


@lru_cache
def _read() -> dict[str, Entry]:
    text = importlib.resources.files("peftc").joinpath("codes.yaml").read_text(encoding="utf-8")
    return {code: Entry(code, **fields) for code, fields in yaml.safe_load(text).items()}
