"""Loads rules: from a name of the library, a path or text to a checked `Rule`.

    >>> rule = load_rule("mam", {"r": 64})
    >>> rule.values["r"], [delta.name for delta in rule.deltas]
    (64, ['prefix', 'adapter'])

Everything wrong with a file is told at once, in one `PeftcError`. No torch is imported here.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from peftc.diagnostics import Collector, Diagnostic, PeftcError, did_you_mean, fail
from peftc.lang import amounts, carries, emit, forms, hypers, inherit
from peftc.lang.carries import CarryReader
from peftc.lang.cases import CaseReader, place_of_tests
from peftc.lang.complaints import shown
from peftc.lang.expr import name_nodes
from peftc.lang.foreign import written_in
from peftc.lang.gradients import check_gradients
from peftc.lang.kinds import kinds_of
from peftc.lang.library import SUFFIXES, catalogue, find, form_names, load_form, read, rule_files, shown_file
from peftc.lang.local_forms import local_forms
from peftc.lang.order import ordered
from peftc.lang.reading import Reader, word, words
from peftc.lang.rewrites import RewriteReader
from peftc.lang.rows import RowReader
from peftc.lang.rule import Delta, Expr, Glob, Hyper, Rule
from peftc.lang.schema import RuleFile, check
from peftc.lang.shapes.check import check_row
from peftc.lang.source import compose, read_text
from peftc.lang.tree import MappingNode, Node, ScalarNode
from peftc.lang.uses import size_names

__all__ = ["form_names", "list_rules", "load_form", "load_rule", "parse_rule", "rule_source", "survey"]


_MODELINE = re.compile(r"\A# yaml-language-server: \$schema=(?!/|\w+:)[^\r\n]*(\r\n|\r|\n)")
"""A first line that names a schema by a path relative to the file: it leads nowhere from where the text is stored."""


def load_rule(name_or_path: str | os.PathLike[str], sets: Mapping[str, object] | None = None) -> Rule:
    """The rule at a path, or the one of that name in the library, with the hyperparameters `sets`.

    A path is what ends in .yaml or .yml, holds a separator, or exists. Values of `sets` may be text.
    Raises `PeftcError` with every mistake: E018 when there is no such rule.
    """
    text, file = rule_source(name_or_path)
    return parse_rule(text, file, sets)


def rule_source(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a rule file or of a rule of the library, and the file's name as the user sees it; E018, E001."""
    name = os.fspath(name_or_path)
    if _is_path(name):
        if not os.path.isfile(name):  # noqa: PTH113 -- unlike Path.is_file it refuses no name
            fail("E018", f"no rule file at `{shown(name)}`", help=_near_rule(Path(name).stem))
        return read_text(name), name
    found = find(name, "rule", "", "E018")
    return read(found, shown_file(found)), shown_file(found)


def list_rules() -> list[Rule]:
    """Every rule of the library and of extensions that loads, by name."""
    return [*survey()[0].values()]


def survey() -> tuple[dict[str, Rule], list[Diagnostic]]:
    """Every rule that loads, by name; and what is wrong with the others, and with the packages that bring some."""
    known = catalogue("")
    problems = [*known.problems, *known.clashes("rule")]
    problems += [*catalogue("forms").clashes("form"), *catalogue("patterns").clashes("pattern")]
    rules: dict[str, Rule] = {}
    for name in sorted(known.items):
        try:
            rules[name] = load_rule(name)
        except PeftcError as error:
            problems += error.diagnostics
    return rules, problems


def parse_rule(text: str, file: str, sets: Mapping[str, object] | None = None) -> Rule:
    """The rule that YAML `text` holds; `file` is its name in errors. Raises `PeftcError` with every mistake."""
    text = text.removeprefix("\ufeff")
    collector = Collector()
    tree = compose(text, file, collector)
    if any(error.code == "E016" for error in collector.errors):
        collector.raise_if_errors()
    if not isinstance(tree, MappingNode):
        fail("E009", "a rule must be a mapping of `key: value`", span=tree.span, help="it starts with `peftc: 1`")
    forms.check_version(tree, "peftc", "rule")
    whole = inherit.gathered(tree, text, file, collector)
    alone = whole is tree
    declared, written, tests = whole.get("hyper"), _written_params(whole), whole.get("tests")
    tree = check(whole, RuleFile, collector)
    hypers.check_entries(declared, collector)
    values = hypers.resolve(tree.get("hyper"), sets or {}, collector)
    Reader(collector).fresh(tree.get("hyper"), "a hyperparameter", {})
    names = frozenset(declared.entries) if isinstance(declared, MappingNode) else frozenset[str]()
    kinds = kinds_of(tree.get("patterns"), collector)
    own = local_forms(tree.get("forms"), collector)
    carried = frozenset(_named(tree, "carry"))
    rows = RowReader(file, values, names, collector, kinds, written, own, carried=carried)
    other = CarryReader(file, values, names, collector, kinds, written, carried=carried)
    deltas = (*_carried(tree, other, rows.sound), *_rows(tree, rows, other))
    _check_sizes(deltas, values, collector)
    _check_shapes([delta for delta in deltas if delta.name in rows.sound], values, collector)
    train = tuple(Glob(item.text, item.span) for item in words(tree.get("train")))
    if not tree.get("deltas") and not tree.get("rewrite") and not train and not collector.errors:
        help = "`deltas` adds parameters to the model, `train` names parameters it has"
        span = forms.first_token(tree)
        collector.error("E010", "the rule has neither `deltas` nor `rewrite` nor `train`", span=span, help=help)
    case_reader = CaseReader(tree.get("hyper"), values, tuple(written), rows, collector, tests, carried)
    cases = case_reader.cases(tree.get("tests"))
    collector.raise_if_errors()
    self_contained = written_in(tree, [delta.form.name for delta in deltas], kinds.used)
    return Rule(
        word(tree.get("name")) or "",
        deltas,
        values,
        train,
        word(tree.get("doc")) or "",
        word(tree.get("paper")) or "",
        file,
        _in_place(text, tree, values) if alone and self_contained is tree else _resolved(self_contained, values),
        cases,
        dict(kinds.used),
    )


def _in_place(text: str, tree: MappingNode, values: Mapping[str, Hyper]) -> str:
    """The text of a rule that stands alone, with its values set and without its tests."""
    return _MODELINE.sub("", amounts.rewrite(text, tree.get("hyper"), values, place_of_tests(text, tree)))


def _resolved(tree: MappingNode, values: Mapping[str, Hyper]) -> str:
    """The text of a rule that takes from other files, with all of that written in and without its tests."""
    tree = MappingNode({name: entry for name, entry in tree.entries.items() if name != "tests"}, tree.span, tree.size)
    if "hyper" in tree.entries:
        hyper = amounts.with_amounts(tree.get("hyper"), values)
        assert hyper is not None
        tree = MappingNode({**tree.entries, "hyper": (tree.key("hyper"), hyper)}, tree.span, tree.size)
    return emit.emit(tree)


def _rows(tree: MappingNode, reader: RowReader, rewriter: RewriteReader) -> tuple[Delta, ...]:
    """The rows of `deltas` and the entries of `rewrite`, in one order; E023 for a name that both have."""
    rows, entries = _named(tree, "deltas"), _named(tree, "rewrite")
    found: list[Delta] = []
    for name in ordered({name: node for name, (_, node) in (rows | entries).items()}, reader.collector):
        if name in rows:
            found += _row(*rows[name], reader)
        if name in entries:
            found += _entry(*entries[name], rewriter, rows)
    return tuple(found)


def _carried(tree: MappingNode, reader: CarryReader, sound: set[str]) -> tuple[Delta, ...]:
    """The entries of `carry`, in the order of the file; `sound` takes the names of those without a mistake."""
    entries, found = _named(tree, "carry"), list[Delta]()
    carries.check_names(entries, reader, (*_named(tree, "deltas"), *_named(tree, "rewrite")))
    for key, node in entries.values():
        before = len(reader.collector.errors)
        delta = reader.carry(key, node) if isinstance(node, MappingNode) else None
        found += [delta] if delta is not None else []
        if len(reader.collector.errors) == before:
            sound.add(key.text)
    carries.check_cycles(found, reader.collector)
    return tuple(found)


def _row(key: ScalarNode, node: Node, reader: RowReader) -> list[Delta]:
    before = len(reader.collector.errors)
    delta = reader.row(key, node) if isinstance(node, MappingNode) else None
    if len(reader.collector.errors) == before:
        reader.sound.add(key.text)
    return [delta] if delta is not None else []


def _entry(key: ScalarNode, node: Node, reader: RewriteReader, rows: Container[str]) -> list[Delta]:
    if key.text in rows:
        message, help = f"`{key.text}` already names a row of `deltas`", "choose another name"
        reader.collector.error("E023", message, span=key.span, help=help)
    delta = reader.entry(key, node) if isinstance(node, MappingNode) else None
    return [delta] if delta is not None else []


def _named(tree: MappingNode, key: str) -> dict[str, tuple[ScalarNode, Node]]:
    found = tree.get(key)
    return dict(found.entries) if isinstance(found, MappingNode) else {}


def _written_params(tree: MappingNode) -> dict[str, frozenset[str]]:
    """The names under `params:` of each row and each entry of `carry` and `rewrite`."""
    found: dict[str, frozenset[str]] = {}
    for key in ("carry", "deltas", "rewrite"):
        for name, (_, row) in _named(tree, key).items():
            params = row.get("params") if isinstance(row, MappingNode) else None
            found[name] = frozenset(params.entries) if isinstance(params, MappingNode) else frozenset()
    return found


def _check_sizes(deltas: tuple[Delta, ...], values: Mapping[str, Hyper], collector: Collector) -> None:
    """E014 for each hyperparameter below 1 that a shape uses, and for such values under `with:`."""
    sizes: dict[str, bool] = {}
    for delta in deltas:
        for param in (*delta.form.params, *delta.params):
            for name, whole in size_names(param).items():
                given = delta.arguments.get(name)
                if isinstance(given, Expr):
                    bare = isinstance(given.tree, ast.Name)
                    sizes |= {inner: sizes.get(inner, False) or (whole and bare) for inner in name_nodes(given)}
                elif name in delta.arguments:
                    given = Hyper(name, given, span=delta.spans.get(f"with.{name}", delta.span_at("with")))
                    hypers.check_size(given, collector, whole=whole)
                else:
                    sizes[name] = sizes.get(name, False) or whole
    for name, whole in sizes.items():
        if name in values and name not in hypers.SIZES:
            for one in (values[name], *hypers.layer_hypers(values[name])):
                hypers.check_size(one, collector, whole=whole)


def _check_shapes(deltas: Iterable[Delta], values: Mapping[str, Hyper], collector: Collector) -> None:
    """E013 for what does not fit in the rows, once every size is a size, and E024 for what no gradient reaches."""
    if not any(error.code == "E014" for error in collector.errors):
        words = {name: hyper.value for name, hyper in values.items()}
        for delta in deltas:
            collector.extend(found for found in check_row(delta, values) if found.severity == "error")
            collector.extend(check_gradients(delta, words))


def _is_path(name: str) -> bool:
    separators = [separator for separator in (os.sep, os.altsep, "/") if separator]
    return name.endswith(SUFFIXES) or any(s in name for s in separators) or os.path.isfile(name)  # noqa: PTH113


def _near_rule(stem: str) -> str:
    near = did_you_mean(stem, rule_files()) or ""
    return (
        f"{near} in the library" if near.startswith("did") else "a bare name, such as `mam`, is a rule of the library"
    )
