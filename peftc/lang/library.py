"""The library that is installed with peftc: rules and forms as YAML files of the package `peftc.rules`."""

from __future__ import annotations

import importlib.resources
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.diagnostics import did_you_mean, fail
from peftc.lang.complaints import shown
from peftc.lang.forms import parse_form
from peftc.lang.rule import Form

if TYPE_CHECKING:
    from importlib.abc import Traversable

SUFFIXES = (".yaml", ".yml")


def rule_files() -> dict[str, Traversable]:
    """The library's rules by name."""
    return _files("")


def form_names() -> list[str]:
    """The names of the library's forms."""
    return sorted(_files("forms"))


def load_form(name: str) -> Form:
    """The form of that name in the library. Raises `PeftcError`, with E006 when there is none."""
    found = _files("forms").get(name)
    if found is None:
        fail("E006", f"unknown form `{shown(name)}`", help=did_you_mean(name, form_names()))
    return _form(name, shown_file(found))


@lru_cache
def _form(name: str, shown: str) -> Form:
    return parse_form(read(_files("forms")[name]), shown)


def read(item: Traversable) -> str:
    return item.read_text(encoding="utf-8")


def shown_file(item: Traversable) -> str:
    """The file's path as the user sees it: relative when it is below the current directory."""
    path = Path(str(item))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@lru_cache
def _files(folder: str) -> dict[str, Traversable]:
    root = importlib.resources.files("peftc.rules")
    place = root.joinpath(folder) if folder else root
    return {Path(item.name).stem: item for item in place.iterdir() if item.name.endswith(SUFFIXES)}
