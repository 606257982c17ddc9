"""Extensions: the rules, forms, patterns and ops that other installed packages bring, found by their entry points.

    [project.entry-points."peftc.rules"]
    gates = "peftc_gates"                  # a package that holds *.yaml, forms/*.yaml, patterns/*.yaml

    [project.entry-points."peftc.ops"]
    gates = "peftc_gates.ops:OPS"          # an `Op`, or a list of them, each with its `writer`

Entry points are read once, on the first name that a rule uses; a package is imported only then, and its writers only
when a graph is written. A package that cannot be used is a `problem` (E045), told where a name is not found; a name
that two packages bring is told where it is used (E046). Neither disturbs a rule that needs neither.
"""

from __future__ import annotations

import importlib
import importlib.resources
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from peftc.diagnostics import Diagnostic, PeftcError

if TYPE_CHECKING:
    from importlib.abc import Traversable
    from importlib.metadata import EntryPoint

    from peftc.lang.ops import Op

RULES_GROUP, OPS_GROUP = "peftc.rules", "peftc.ops"
LIBRARY = "peftc"
"""The origin of what is installed with peftc itself."""

_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_PACKAGE, _OBJECT = re.compile(_PATH), re.compile(rf"({_PATH})\s*:\s*({_PATH})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

T = TypeVar("T")


@dataclass(slots=True)
class Catalogue(Generic[T]):
    """Things by name, each with the packages that bring it; only a name that one package brings is in `items`."""

    items: dict[str, T] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)
    """What is wrong with packages, each an E045."""

    def add(self, name: str, item: T, origin: str) -> None:
        owners = self.origins.setdefault(name, [])
        if owners == [origin] and self.items.get(name) == item:
            return  # the same thing by two entry points
        owners.append(origin)
        if len(owners) == 1:
            self.items[name] = item
        else:
            self.items.pop(name, None)

    def origin(self, name: str) -> str:
        return self.origins[name][0]

    def clash(self, name: str, what: str) -> Diagnostic | None:
        """E046 when more than one package brings `name`, a `what` such as `rule`."""
        owners = self.origins.get(name, [])
        if len(owners) < 2:
            return None
        message = f"the {what} `{name}` is in more than one package: {', '.join(owners)}"
        return Diagnostic("E046", message, help="uninstall all but one of them; none hides another")

    def refuse_clash(self, name: str, what: str) -> None:
        """Raise `PeftcError` with E046 when more than one package brings `name`."""
        clash = self.clash(name, what)
        if clash is not None:
            raise PeftcError([clash])

    def clashes(self, what: str) -> list[Diagnostic]:
        found = (self.clash(name, what) for name in self.origins)
        return [diagnostic for diagnostic in found if diagnostic is not None]


@dataclass(frozen=True, slots=True)
class Folder:
    """A package that holds rules, with the distribution it belongs to."""

    root: Traversable
    origin: str


def problem(origin: str, reason: str, help: str | None = None) -> Diagnostic:
    """E045: the package `origin` cannot be used."""
    help = help or "mend it, or uninstall it; what it does not bring works as before"
    return Diagnostic("E045", f"the package `{origin}` cannot be used: {reason}", help=help)


@lru_cache
def rule_folders() -> tuple[tuple[Folder, ...], tuple[Diagnostic, ...]]:
    """The packages under `peftc.rules`, and what is wrong with those that are none."""
    folders: list[Folder] = []
    problems: list[Diagnostic] = []
    for point, origin in entry_points(RULES_GROUP):
        if not _PACKAGE.fullmatch(point.value):
            wanted = f'the entry point `{point.name} = "{point.value}"` of {RULES_GROUP} does not name a package'
            problems.append(problem(origin, wanted, 'as in `gates = "peftc_gates"`'))
            continue
        root = _tried(origin, lambda value=point.value: _package(value), problems)
        if root is not None and not any(folder.root == root for folder in folders):
            folders.append(Folder(root, origin))
    return tuple(folders), tuple(problems)


@lru_cache
def extension_ops() -> Catalogue[Op]:
    """The ops under `peftc.ops`. Names of the library count as brought by it, so that they clash."""
    from peftc.lang.ops import LIBRARY_OPS

    found: Catalogue[Op] = Catalogue(origins={name: [LIBRARY] for name in LIBRARY_OPS})
    for point, origin in entry_points(OPS_GROUP):
        if not _OBJECT.fullmatch(point.value):
            wanted = f'the entry point `{point.name} = "{point.value}"` of {OPS_GROUP} is not `module:attribute`'
            found.problems.append(problem(origin, wanted, 'as in `gates = "peftc_gates.ops:OPS"`'))
            continue
        value = _tried(origin, lambda value=point.value: named_object(value), found.problems)
        for op in () if value is None else _ops(value, point, origin, found.problems):
            found.add(op.name, op, origin)
    return found


@lru_cache
def load_writer(op: Op, origin: str) -> Callable[..., Any]:
    """The function that an extension's op is written by. Raises `PeftcError` E045 when there is none."""
    problems: list[Diagnostic] = []
    write = _tried(origin, lambda: named_object(op.writer), problems)
    if problems:
        raise PeftcError(problems)
    if not callable(write):
        unusable(origin, f"the writer `{op.writer}` of the op `{op.name}` is not a function")
    return write


def unusable(origin: str, reason: str) -> NoReturn:
    """Raise `PeftcError` with the E045 of `problem`."""
    raise PeftcError([problem(origin, reason)])


def named_object(text: str) -> Any:
    """The object that `module:attribute` names. Raises whatever importing the module raises."""
    module, _, attribute = text.partition(":")
    found: Any = importlib.import_module(module.strip())
    for part in attribute.strip().split("."):
        found = getattr(found, part)
    return found


@lru_cache
def entry_points(group: str) -> tuple[tuple[EntryPoint, str], ...]:
    """The entry points of a group, each with its distribution's name and version, in an order that never changes."""
    found = {(point.name, point.value, _origin(point)): point for point in metadata.entry_points(group=group)}
    return tuple((found[key], key[2]) for key in sorted(found, key=lambda key: (key[2], key[0], key[1])))


def _origin(point: EntryPoint) -> str:
    """The distribution's name and version; the package's name where the metadata is not whole."""
    about = point.dist.metadata if point.dist is not None else None
    name, version = (about["Name"], about["Version"]) if about is not None else (None, None)
    return " ".join(part for part in (name or re.split(r"[.:]", point.value)[0], version) if part)


def _package(name: str) -> Traversable:
    module = importlib.import_module(name)
    if getattr(module, "__path__", None) is None:
        raise ImportError(f"`{name}` is a module, not a package with a folder of its own")
    return importlib.resources.files(module)


def _tried(origin: str, load: Callable[[], T], problems: list[Diagnostic]) -> T | None:
    """What `load` gives; None and a problem when it raises, for a package's import can raise anything."""
    try:
        return load()
    except Exception as error:  # noqa: BLE001 -- foreign code: any exception of its means that it cannot be used
        problems.append(problem(origin, told(error)))
        return None


def told(error: BaseException) -> str:
    """An exception of foreign code in one line, with the place in that code."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    place = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _ops(value: object, point: EntryPoint, origin: str, problems: list[Diagnostic]) -> Iterator[Op]:
    """The ops in what an entry point names; what is none goes to `problems`."""
    from peftc.lang.ops import Op

    items: Iterable[object] = value if isinstance(value, (list, tuple)) else (value,)
    for item in items:
        reason = _fault(item) if isinstance(item, Op) else f"a {type(item).__name__}, not an `Op` or a list of them"
        if reason is None:
            assert isinstance(item, Op)
            yield item
        else:
            problems.append(problem(origin, f"`{point.value}` gives {reason}"))


def _fault(op: Op) -> str | None:
    """What is wrong with an op that an extension made; None when it is right."""
    if not isinstance(op.name, str) or not _NAME.fullmatch(op.name):
        return f"an op whose name is {op.name!r}, which is no name"
    arity = op.arity
    whole = isinstance(arity, tuple) and len(arity) == 2 and all(type(count) is int for count in arity)
    if not whole or not 0 <= arity[0] <= arity[1]:
        return f"the op `{op.name}` whose arity is {arity!r}, not (least, most)"
    if not isinstance(op.doc, str) or not op.doc.strip():
        return f"the op `{op.name}` without a line of doc"
    if not isinstance(op.keywords, tuple) or not all(isinstance(k, str) and _NAME.fullmatch(k) for k in op.keywords):
        return f"the op `{op.name}` whose keywords are {op.keywords!r}, not names"
    if not isinstance(op.writer, str) or not _OBJECT.fullmatch(op.writer):
        return f"the op `{op.name}` whose writer is {op.writer!r}, not `module:function`"
    if not _is_signature(op.shapes, op.arity[1]):
        return f"the op `{op.name}` whose shapes are {op.shapes!r}, not as in `[.., n], [n] -> [.., n]`"
    return None


def _is_signature(text: object, most: int) -> bool:
    """Whether `text` says shapes of at most `most` operands, each size of the result being one of theirs."""
    from peftc.lang.shapes.signature import signature

    if not isinstance(text, str) or not text:
        return text == ""
    try:
        found = signature(text)
    except ValueError:
        return False
    known = {factor for operand in found.operands for size in operand.sizes for factor in size}
    used = {factor for size in found.result.sizes for factor in size if not factor.isdigit()}
    return len(found.operands) <= most and used <= known
