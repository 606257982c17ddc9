"""The library: rules and forms as YAML files, those of the package `peftc.rules` and those that other packages bring.

A package is brought in by an entry point of the group `peftc.rules` (`peftc.lang.extensions`). A name that two
packages bring stands for neither of them: using it is an error that names both.
"""

from __future__ import annotations

import importlib.resources
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean
from peftc.lang.complaints import shown
from peftc.lang.extensions import LIBRARY, Catalogue, Folder, entry_points, extension_ops, load_writer, rule_folders
from peftc.lang.forms import parse_form
from peftc.lang.rule import Form
from peftc.lang.source import read_text
from peftc.patterns.reading import parse_pattern
from peftc.patterns.terms import Pattern

if TYPE_CHECKING:
    from importlib.abc import Traversable

SUFFIXES = (".yaml", ".yml")


def rule_files() -> dict[str, Traversable]:
    """The rules by name."""
    return catalogue("").items


def form_names() -> list[str]:
    """The names of the forms."""
    return sorted(catalogue("forms").items)


def load_form(name: str) -> Form:
    """The form of that name. Raises `PeftcError`: E006 when there is none, E046 when two packages bring it."""
    return _form(name, shown_file(find(name, "form", "forms", "E006")))


def find(name: str, what: str, folder: str, code: str) -> Traversable:
    """The file of a rule, form or pattern, as `what` calls it. Raises `PeftcError`.

    `code` when there is none, together with an E045 for each package that might hold it and cannot be used; E046 when
    more than one package brings it.
    """
    known = catalogue(folder)
    known.refuse_clash(name, what)
    if name not in known.items:
        where = "" if folder else " in the library"
        unknown = "unknown" if folder else "no"
        message = f"{unknown} {what} `{shown(name)}`{where}"
        raise PeftcError([Diagnostic(code, message, help=did_you_mean(name, known.items)), *known.problems])
    return known.items[name]


def pattern_names() -> list[str]:
    """The names of the patterns."""
    return sorted(catalogue("patterns").items)


def load_pattern(name: str) -> Pattern | None:
    """The pattern of that name, or None. Raises `PeftcError` for one with a mistake, E046 for two of that name."""
    known = catalogue("patterns")
    known.refuse_clash(name, "pattern")
    return _pattern(name, shown_file(known.items[name])) if name in known.items else None


@lru_cache
def _pattern(name: str, shown: str) -> Pattern:
    return parse_pattern(read(catalogue("patterns").items[name], shown), shown)


@lru_cache
def _form(name: str, shown: str) -> Form:
    return parse_form(read(catalogue("forms").items[name], shown), shown)


def read(item: Traversable, shown: str) -> str:
    """The text of a file; E001 when it is not UTF-8, E017 when it is too large."""
    return read_text(item, shown)


def shown_file(item: Traversable) -> str:
    """The file's path as the user sees it: relative when it is below the current directory."""
    path = Path(str(item))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@lru_cache
def catalogue(folder: str) -> Catalogue[Traversable]:
    """The YAML files of `folder` ("" for rules, "forms", "patterns"), of the library and of other packages."""
    folders, problems = rule_folders()
    found: Catalogue[Traversable] = Catalogue(problems=[*problems])
    for package in (Folder(importlib.resources.files("peftc.rules"), LIBRARY), *folders):
        place = package.root.joinpath(folder) if folder else package.root
        if place.is_dir():
            for item in sorted(place.iterdir(), key=lambda item: item.name):
                if item.name.endswith(SUFFIXES):
                    found.add(Path(item.name).stem, item, package.origin)
    return found


def forget() -> None:
    """Look for entry points and files anew on the next use: for a process that installs packages while it runs."""
    for cached in (entry_points, rule_folders, extension_ops, load_writer, catalogue, _form, _pattern):
        cached.cache_clear()
