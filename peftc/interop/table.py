"""The table of methods: `methods.yaml` as values. See the head of that file for what its keys mean."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from peftc.lang.expr import parse
from peftc.lang.rule import Expr

ANY = "any"


@dataclass(frozen=True, slots=True)
class View:
    """Where a parameter's values lie in a stored tensor.

    The tensor is read as `shape` (as it is, where there is none), of which `take` takes entries, one expression or
    None (all of them) for each axis; then its axes come in `order`. What is left is reshaped to the parameter's shape.
    """

    key: str
    shape: tuple[Expr, ...] = ()
    take: tuple[Expr | tuple[Expr, Expr] | None, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def owned(self) -> bool:
        """Whether the tensor is a module's own."""
        return not self.key.startswith("/")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One set of tensors that a layer may have, and the row of a rule that computes with them."""

    at: str
    tensors: Mapping[str, View]
    row: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)
    when: Mapping[str, Any] = field(default_factory=dict)
    fits: Mapping[str, tuple[Expr, ...]] = field(default_factory=dict)
    """Shapes that stored tensors must have, over the sizes of the site."""
    apart: tuple[str, ...] = ()
    """Sizes of sites that are never different within a row."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Options that an export gives an adapter with such layers."""
    lists: str = ""
    """An option that lists the modules with such a layer."""
    tied: bool = False
    """Whether the layer changes weights that are tied to its own, too."""
    targets: bool = True
    """Whether `target_modules` lists the modules with such a layer."""
    unless: Mapping[str, str] = field(default_factory=dict)
    """Taps of sites at which PEFT computes something else, with what."""

    @property
    def scale(self) -> str | None:
        """The name of the number by which dh is multiplied, where that may be any."""
        return "alpha" if "alpha" in self.values else None

    @property
    def suffixes(self) -> frozenset[str]:
        """The names, behind the module's, of the tensors that are a module's own."""
        return frozenset(view.key for view in self.tensors.values() if view.owned)


@dataclass(frozen=True, slots=True)
class Method:
    """A method of PEFT: its name there, the options it may have, and its layers."""

    peft_type: str
    rule: str
    doc: str
    paper: str
    options: Mapping[str, Any]
    words: Mapping[str, Mapping[str, str]]
    layers: tuple[Layer, ...]
    trains: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the base that the method trains as they are: of sites of which kind, saved behind which word."""

    @property
    def suffixes(self) -> list[str]:
        """The names behind a module's name that a tensor of the method may have, the longest first."""
        return sorted({suffix for layer in self.layers for suffix in layer.suffixes}, key=len, reverse=True)


@lru_cache(maxsize=1)
def methods() -> dict[str, Method]:
    """The methods by PEFT's name for them."""
    text = importlib.resources.files("peftc.interop").joinpath("methods.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    common = table.pop("common")
    return {name: _method(name, entry, common) for name, entry in table.items()}


def _method(name: str, entry: Mapping[str, Any], common: Mapping[str, Any]) -> Method:
    layers = tuple(_layer(layer) for layer in entry["layers"])
    options = {**common, **entry["options"]}
    return Method(
        name,
        entry["rule"],
        entry["doc"],
        entry["paper"],
        options,
        entry.get("words", {}),
        layers,
        entry.get("trains", {}),
    )


def _layer(entry: Mapping[str, Any]) -> Layer:
    tensors = {name: _view(view) for name, view in entry["tensors"].items()}
    fits = {name: tuple(static(size) for size in shape) for name, shape in entry.get("fits", {}).items()}
    values, when, apart = entry.get("values", {}), entry.get("when", {}), tuple(entry.get("apart", ()))
    tied, targets = entry.get("tied", False), entry.get("targets", True)
    config, lists = entry.get("config", {}), entry.get("lists", "")
    return Layer(
        entry["at"],
        tensors,
        entry["row"],
        values,
        when,
        fits,
        apart,
        config,
        lists,
        tied,
        targets,
        entry.get("unless", {}),
    )


def _view(entry: str | Mapping[str, Any]) -> View:
    if isinstance(entry, str):
        return View(entry)
    taken = tuple(_entries(part) for part in entry.get("take", ()))
    shape = tuple(static(size) for size in entry.get("shape", ()))
    return View(entry["key"], shape, taken, tuple(entry.get("order", ())))


def _entries(part: str | int) -> Expr | tuple[Expr, Expr] | None:
    first, colon, last = str(part).partition(":")
    if not colon:
        return static(part)
    return (static(first or 0), static(last)) if last else None


def static(text: str | int) -> Expr:
    """An expression over sizes, of the table."""
    return parse(str(text), mode="static")
