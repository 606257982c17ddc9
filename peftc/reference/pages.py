"""The reference of the rule language as Markdown, from the tables and types that the compiler itself reads.

Every key comes from the pydantic types of `peftc.lang.schema`, so that a key which is added there is documented.
`peftc schema --markdown` prints the page; `make reference` writes it, and the tables in rules/README.md.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peftc.lang import grammar, site_docs, source
from peftc.lang.arguments import count
from peftc.lang.extensions import LIBRARY
from peftc.lang.forms import needs
from peftc.lang.json_schema import KINDS
from peftc.lang.library import catalogue, load_form, load_pattern
from peftc.lang.loader import load_rule
from peftc.lang.ops import INIT_OPS, INITS, LIBRARY_OPS, Op
from peftc.lang.rule import Rule
from peftc.lang.schema import Expression, Name, Value, Word, Words
from peftc.lang.sites import COMPOSITIONS, DIMS, INSERTIONS, SITES, TAPS
from peftc.reference.explain import ENTRIES
from peftc.reference.library_table import Measured, measured

_NAMED = {
    Expression: "expression",
    Value: "number, word or boolean",
    Word: "word",
    Words: "word or list of words",
    Name: "name",
    int: "whole number",
    float: "number",
    int | float: "number",
    bool: "boolean",
    str: "text",
}


def reference() -> str:
    """The whole page."""
    parts = [_HEAD, *_keys(), *_places(), *_expressions(), *_limits(), *_codes()]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


_HEAD = """# Reference of the rule language

Generated from peftc's own tables by `peftc schema --markdown`; do not edit. [LANGUAGE.md](LANGUAGE.md) teaches the
language, [README.md](README.md) is about the library."""


def _keys() -> Iterator[str]:
    yield "## Keys\n\nAn unknown key is an error. `name` stands for a name of the rule's own: letters, digits and `_`."
    seen: list[type[BaseModel]] = []
    for model, _ in KINDS.values():
        seen += [found for found in _models(model) if found not in seen]
    for model in seen:
        rows = [
            (f"`{field.alias or key}`", words(_hints(model)[key]), _default(field), field.description or "")
            for key, field in model.model_fields.items()
        ]
        yield f"### {title(model)}\n\n" + table(("key", "value", "default", "what it is"), rows)


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and those inside of it, in the order in which they are first named."""
    found: list[type[BaseModel]] = []
    queue = [model]
    while queue:
        one = queue.pop(0)
        if one not in found:
            found.append(one)
            queue += [inner for hint in _hints(one).values() for inner in _inside(hint)]
    return found


def _inside(hint: Any) -> list[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    return [model for part in get_args(hint) for model in _inside(part)]


def _hints(model: type[BaseModel]) -> dict[str, Any]:
    hints = get_type_hints(model, include_extras=True)
    return {key: hints[key] for key in model.model_fields}


def title(model: type[BaseModel]) -> str:
    """The heading of a model: the first line of its docstring, up to a colon."""
    return (model.__doc__ or model.__name__).strip().splitlines()[0].partition(":")[0].rstrip(".")


def words(hint: Any) -> str:
    """A type in the words of a rule's author."""
    for known, text in _NAMED.items():
        if hint == known:
            return text
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return words(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return _alternatives(parts)
    if origin is list:
        return f"list of {words(parts[0])}"
    if origin is dict:
        return f"mapping of {words(parts[0])} to {words(parts[1])}"
    return f"[{title(hint)}](#{anchor(title(hint))})"


def _alternatives(parts: Iterable[Any]) -> str:
    """A union; `None` in it says that the key may be left out, or its value left empty, and goes without saying."""
    found = [part for part in parts if part is not type(None)]
    for known in (Words, Value, int | float):
        members = get_args(known)
        if set(members) <= set(found):
            found = [known, *(part for part in found if part not in members)]
    lists = [part for part in found if get_origin(part) is list and get_args(part)[0] in found]
    told = [words(part) for part in found if part not in lists]
    return " or ".join(dict.fromkeys(told)) + (", or a list of them" if lists else "")


def anchor(heading: str) -> str:
    """The fragment that Markdown renderers give a heading."""
    kept = "".join(char for char in heading.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if default is None or default in ("", [], {}):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _places() -> Iterator[str]:
    yield "## Places\n\nB is the batch, S the sequence. A site may lack a tap: `peftc sites` shows what a model has."
    for site, taps in SITES.items():
        rows = [(f"`{tap}`", site_docs.TAP_DOCS[site][tap]) for tap in taps]
        yield f"### `{site}`: {site_docs.SITE_DOCS[site]}\n\n" + table(("tap", "what it is"), rows)
    for heading, names, docs in (
        ("Dimensions", DIMS, site_docs.DIM_DOCS),
        ("Insertions", INSERTIONS, site_docs.INSERTION_DOCS),
        ("Compositions with a name", COMPOSITIONS, site_docs.COMPOSITION_DOCS),
    ):
        yield f"### {heading}\n\n" + table(("name", "what it is"), [(f"`{name}`", docs[name]) for name in names])


def _expressions() -> Iterator[str]:
    yield "## Expressions\n\nOver tensors, " + grammar._ADMITTED["tensor"] + "."
    yield "In sizes and conditions, " + grammar._ADMITTED["static"] + "."
    for heading, ops in (
        ("Ops", LIBRARY_OPS),
        ("In sizes and conditions", grammar.STATIC_CALLS),
        ("In `init`, in the shape of the parameter", INITS),
        ("In `init`, over `weight`, `h` and the parameters above, beside the ops", INIT_OPS),
    ):
        yield f"### {heading}\n\n" + _op_table(ops)


def _op_table(ops: Mapping[str, Op]) -> str:
    rows = [
        (f"`{op.name}`", count(op).split(" arg")[0] if op.arity[1] else "", ", ".join(op.keywords), op.doc)
        for op in ops.values()
    ]
    return table(("name", "arguments", "by keyword", "what it gives"), rows)


def _limits() -> Iterator[str]:
    rows = [
        (f"{source.MAX_BYTES // 1024} KiB", "a file"),
        (f"{source.MAX_DEPTH}", "levels of nesting in YAML"),
        (f"{source.MAX_ENTRIES}", "keys of one mapping, items of one list"),
        (f"{source.MAX_ALIASES}", "aliases in a file"),
        (f"{grammar.MAX_LENGTH}", "characters of an expression"),
        (f"{grammar.MAX_DEPTH}", "levels of nesting in an expression"),
        (f"{grammar.MAX_EXPONENT}", "an exponent"),
        ("2 ** 53", "a whole number; 1e300 one with a point"),
    ]
    yield "## Limits\n\nWhat is beyond is E017, before it costs time or memory.\n\n" + table(("at most", "of"), rows)


def _codes() -> Iterator[str]:
    yield "## Diagnostics\n\n`peftc explain CODE` shows a wrong and a right example of each."
    yield "\n".join(f"- **{e.code}** {e.title}. {' '.join(e.text.split())}" for e in ENTRIES.values())


def methods() -> str:
    """The rules of the library, a row each."""
    rows = []
    for name, rule in library_rules().items():
        changes = dict.fromkeys(f"{', '.join(d.at)}: {', '.join(d.modify)}" for d in rule.deltas if d.modify)
        changes |= dict.fromkeys(f"{glob.pattern}" for glob in rule.train)
        results = dict.fromkeys(result for case in rule.tests for result in case.fold.values())
        starts = {case.identity for case in rule.tests} - {None}
        mark = " *" if starts == {True} else ""
        doc = " ".join(rule.doc.split())
        found = measured().get(name, Measured())
        trains = "" if found.percent is None else f"{found.percent:.2f} %"
        held = found.references[0].to if found.references else ""
        cells = "; ".join(changes), trains, ", ".join(results), held, rule.paper
        rows.append((f"`{name}`{mark}", doc, *cells))
    return table(("rule", "what it is", "changes", "trains", "merge gives", "held to", "from"), rows)


def library_rules() -> dict[str, Rule]:
    """The rules of peftc itself, by name."""
    known = catalogue("")
    names = sorted(name for name, origins in known.origins.items() if LIBRARY in origins)
    return {name: load_rule(name) for name in names}


def forms() -> str:
    names = sorted(name for name, origins in catalogue("forms").origins.items() if LIBRARY in origins)
    found = [(name, load_form(name)) for name in names]
    return table(
        ("form", "what it computes", "arguments", "needs"),
        [
            (
                f"`{name}`",
                " ".join(form.doc.split()),
                ", ".join(f"{argument}: {_plain(value)}" for argument, value in form.args.items()),
                ", ".join(sorted(needs(form).keys() - TAPS)),
            )
            for name, form in found
        ],
    )


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def patterns() -> str:
    names = sorted(name for name, origins in catalogue("patterns").origins.items() if LIBRARY in origins)
    found = [(name, load_pattern(name)) for name in names]
    rows = [(f"`{name}`", " ".join(p.doc.split()), ", ".join(p.taps)) for name, p in found if p is not None]
    return table(("pattern", "what it finds", "taps"), rows)


SECTIONS: dict[str, Callable[[], str]] = {"methods": methods, "forms": forms, "patterns": patterns}
_SECTION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with its generated sections written anew."""
    return _SECTION.sub(lambda found: f"{found[1]}\n{SECTIONS[found[2]]()}\n\n{found[3]}", page)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(folder: Path) -> None:
    """Write REFERENCE.md and the tables of README.md in `folder`."""
    (folder / "REFERENCE.md").write_text(reference(), encoding="utf-8")
    page = folder / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
