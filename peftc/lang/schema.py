"""The shape of rule and form files as pydantic models, and pydantic's complaints as diagnostics with places.

The models say which keys exist and what type their values have; a JSON Schema for editors is generated from them
(`peftc.lang.json_schema`). What the values mean is checked by `peftc.lang.build`. `check` reports each
mistake once, at the token that is wrong, and returns the tree without the wrong parts, so that checking can go on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.fields import FieldInfo

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.amounts import PERCENT
from peftc.lang.complaints import Path, complaints
from peftc.lang.layers import RANGE
from peftc.lang.sites import SITES
from peftc.lang.tree import MappingNode, plain, without

Value = int | float | bool | str
MAX_ITEMS = 1024
Items = Annotated[list[int], Field(min_length=1, max_length=MAX_ITEMS, description="distinct whole numbers")]
Expression = Annotated[Value, Field(description="an expression")]
Word = Annotated[str, Field(min_length=1)]
Words = Word | list[Word]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\??$", max_length=64)]
Stack = Literal["encoder", "decoder"]
Kind = Literal["self", "cross"]
Role = Literal["q", "k", "v", "qkv", "o", "up", "gate", "gate_up", "down", "token", "other"]
LAYERS = rf"^\s*({RANGE})\s*$"
BUDGET = rf"^\s*{PERCENT}\s*$"
LayerKey = Annotated[str, StringConstraints(pattern=rf"^\s*(-?[0-9]{{1,6}}|{RANGE})\s*$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HyperFile(_Model):
    """A hyperparameter with bounds."""

    default: Value | Items | None = Field(
        None,
        description="the value where --set gives none, which may be a list of whole numbers; its type is that of every"
        " value",
    )
    budget: Annotated[str, StringConstraints(pattern=BUDGET)] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="in place of a default: the largest whole number with which the rule trains no more parameters "
        "than 0.5% of the base's, or than a count",
    )
    layers: dict[LayerKey, Value] = Field(
        {}, description="values of single layers (0, -1, 0-5, first 4, last 2), later ones win; --set leaves them"
    )
    min: int | float | None = Field(None, description="the smallest value admitted, or item of a list")
    max: int | float | None = Field(None, description="the largest value admitted, or item of a list")
    doc: str = Field("", description="what it is, in a few words")


class ParamFile(_Model):
    """A tensor of a delta."""

    shape: list[Expression] = Field(description="a list of sizes over hyperparameters and dimensions: [r, d_in]")
    init: Expression = Field(
        description="its initial value: a number, zeros, normal(0.02), ..., or an expression over `weight` and the"
        " parameters above; `peftc ops` lists what it can call"
    )
    dtype: Literal["float64", "float32", "float16", "bfloat16", "base"] | None = Field(
        None,
        description="its type, or base for that of the value it changes; float32 where nothing is said, "
        "float64 on a float64 base",
    )
    share: Literal["site", "layer", "kind", "stack", "model"] = Field(
        "site", description="which sites use one and the same tensor"
    )
    frozen: bool = Field(False, description="stored, but not trained")
    lr: Expression | None = Field(
        None, description="what the learning rate is multiplied by for this tensor, 1 where nothing is said"
    )
    condition: Expression | None = Field(
        None, alias="if", description="where this is false there is no such tensor: its name is None in expressions"
    )


class AttendFile(_Model):
    """The site's own queries attending to rows."""

    keys: Expression = Field(description="rows the queries are compared with, [l, kv_heads, key_dim]")
    values: Expression = Field(description="rows that are averaged, [l, kv_heads, head_dim]")


class WhereFile(_Model):
    """Which of the sites named by `at`: every condition given must hold."""

    layers: list[int] | int | Annotated[str, StringConstraints(pattern=LAYERS)] | None = Field(
        None, description="layers by number (negative ones count from the end), or 0-5, first 4, last 2"
    )
    stack: Stack | list[Stack] | None = Field(None, description="encoder or decoder")
    kind: Kind | list[Kind] | None = Field(None, description="self- or cross-attention")
    role: Role | list[Role] | None = Field(
        None, description="which linear layers, for `at: linear`; token is the embedding of token ids"
    )
    path: Words | None = Field(None, description="globs over module paths")
    condition: Expression | None = Field(
        None, alias="if", description="a condition over hyperparameters and the site's dimensions, such as d_ff > 1024"
    )


_ARGS = "arguments with defaults; a word may name an op (f: gelu), to be called: f(x)"
_PARAMS = "the tensors of the delta, by name"
_LET = "names for parts of an expression, each seeing those above it"
_FROM = (
    "taps of other sites: block[0].x is what x is, {skip: block[layer - 1].out} are names for expressions; the value is"
    " that after earlier deltas; {z: 'side[layer - 1] or start[0]'} reads entries of `carry`, the second where the"
    " first names no layer"
)
_BEFORE = "rows or entries of `rewrite` that come after this one, where the order of the file differs"
_AFTER = "rows or entries of `rewrite` that come before this one, where the order of the file differs"
_ATTEND = "in place of an expression: the site's own queries attend to trained rows"


class InlineForm(_Model):
    """A form written in the row itself."""

    expr: Expression | None = Field(None, description="dh as an expression in x, the parameters and `let` names")
    attend: AttendFile | None = Field(None, description=_ATTEND)
    args: dict[Name, Value | None] = Field({}, description=_ARGS)
    params: dict[Name, ParamFile] = Field({}, description=_PARAMS)
    let: dict[Name, Expression] = Field({}, description=_LET)


class DeltaFile(_Model):
    """One row of the table."""

    at: Words = Field(description="which sites of the model: " + ", ".join(SITES))
    modify: Words = Field(
        description="the tap that is changed, called h in `compose`: such as out, heads or weight; "
        "gate? where some sites have none"
    )
    form: Value | InlineForm = Field(description="the function dh = f(x): a form's name, an expression, or a mapping")
    insert: Word = Field("parallel", description="what x is: parallel (the site's input), sequential (h), or a tap")
    compose: Expression = Field("h + dh", description="what becomes of h and dh: an expression, or add, gate, prepend")
    sources: Word | dict[Name, Word] | None = Field(None, alias="from", description=_FROM)
    arguments: dict[Name, Value | None] = Field(
        {}, alias="with", description="values for the form's arguments and sizes"
    )
    where: WhereFile | None = Field(None, description="narrows the sites that `at` names")
    params: dict[Name, ParamFile] = Field({}, description=_PARAMS)
    let: dict[Name, Expression] = Field({}, description=_LET)
    lower: Literal["concat", "gated"] | None = Field(
        None, description="how a prefix is computed: rows joined to keys and values, or a second attention with a gate"
    )
    before: Words | None = Field(None, description=_BEFORE)
    after: Words | None = Field(None, description=_AFTER)
    expect: Annotated[int, Field(ge=0)] | None = Field(None, description="how many sites the row must match")


Result = Literal["merged", "widened", "constant", "kept"]
Sites = Annotated[int, Field(ge=0)] | dict[Name, Annotated[int, Field(ge=0)]]
Folds = Result | dict[Name, Result]


class SameAsFile(_Model):
    """Another rule, and how its parameters are called there."""

    rule: Word = Field(description="a rule of the library, or a file beside this one")
    hyper: dict[Name, Value | Items] = Field({}, description="values for the other rule's hyperparameters")
    map: dict[Name, Word] = Field(
        {}, description="what this rule's rows and parameters are called there, where the names differ"
    )


class CaseFile(_Model):
    """A test of the rule: what must hold of it on built-in tiny models; `peftc test` runs it."""

    family: Words = Field(description="a built-in tiny model, or a list of them; or encoder, decoder, encoder-decoder")
    head: Word | None = Field(None, description="the model's class, as for --head; the family's usual one by default")
    hyper: dict[Name, Value | Items] = Field({}, description="values for the rule's hyperparameters in this test")
    sites: Sites | list[Sites] | None = Field(
        None, description="how many sites each row matches: one number for all, or by row; a list: one for each family"
    )
    trained: Expression | list[Expression] | None = Field(
        None, description="how many parameters train: a number, or a formula over hyperparameters; or one a family"
    )
    identity: bool | list[bool] | None = Field(
        None, description="whether the outputs are the base's before training; or one for each family"
    )
    fold: Folds | list[Folds] | None = Field(
        None, description="what becomes of the deltas when merged: one word for all, or by row; or one for each family"
    )
    forbidden: WhereFile | None = Field(
        None, alias="not", description="sites, described as under `where`, that no row may touch"
    )
    same_as: Word | SameAsFile | None = Field(
        None, description="another rule that computes the same with the same parameters"
    )
    error: Word | None = Field(None, description="the code with which the rule must be refused here, such as E020")


class FormBody(_Model):
    """A functional form: what a form file says beside its header, and an entry of `forms` in a rule."""

    doc: str = Field("", description="what the form computes, in a sentence")
    paper: str = Field("", description="where the form comes from")
    args: dict[Name, Value | None] = Field({}, description=_ARGS)
    params: dict[Name, ParamFile] = Field({}, description=_PARAMS)
    let: dict[Name, Expression] = Field({}, description=_LET)
    dh: Expression | None = Field(None, description="dh as an expression in x, the parameters and `let` names")
    attend: AttendFile | None = Field(None, description=_ATTEND)


class AnyFile(_Model):
    """Alternatives among lines of a pattern."""

    any: list[Word | list[Word | AnyFile]] = Field(
        min_length=2, description="alternatives, each a line or a list of lines: the first one that matches"
    )


Lines = list[Word | AnyFile]


class PatternBody(_Model):
    """A pattern written in a rule, under its name."""

    doc: str = Field("", description="what the pattern finds, in a sentence")
    paper: str = Field("", description="where what it finds comes from")
    match: Word | Lines = Field(description="lines such as out = linear(x, W), from inputs to outputs")
    outputs: Word | list[Word] = Field([], description="the values that leave the site; by default the last line's")
    taps: dict[Name, Word] = Field({}, description="the site's taps, each with its name in the lines; by default all")
    shapes: dict[Name, list[Annotated[int, Field(ge=1)] | Word]] = Field(
        {}, description="sizes of parameters, which name dimensions: W_up: [d_ff, d_model]; `_` is any size"
    )
    where: Expression | None = Field(None, description="a condition over the dimensions that `shapes` names")
    single: Words = Field([], description="values that nothing outside of the site may read")


class PatternFile(PatternBody):
    """A pattern file."""

    version: Literal[1] = Field(alias="peftc-pattern", description="the format of pattern files; this peftc reads 1")
    name: Word = Field(description="the pattern's name, the word for `at:`; that of its file")


class RewriteFile(_Model):
    """Several taps of a site replaced at once."""

    at: Words = Field(description="which sites of the model: " + ", ".join(SITES) + ", or a pattern's name")
    sets: dict[SetName, Expression] = Field(
        alias="set",
        description="what becomes of each tap: an expression over the site's taps as they were, h being this one;"
        " `tap?` where a site may lack it",
    )
    sources: dict[Name, Word] | None = Field(None, alias="from", description=_FROM)
    arguments: dict[Name, Value | None] = Field({}, alias="with", description="numbers by name")
    where: WhereFile | None = Field(None, description="narrows the sites that `at` names")
    params: dict[Name, ParamFile] = Field({}, description="the tensors of the rewrite, by name")
    let: dict[Name, Expression] = Field({}, description=_LET)
    before: Words | None = Field(None, description=_BEFORE)
    after: Words | None = Field(None, description=_AFTER)
    expect: Annotated[int, Field(ge=0)] | None = Field(None, description="how many sites the entry must match")


class CarryFile(_Model):
    """A value computed at every site of a kind, for rows and other entries to read under `from`."""

    at: Words = Field(description="which sites of the model: " + ", ".join(SITES) + ", or a pattern's name")
    value: Expression = Field(
        description="what is computed: an expression over the site's taps, parameters, `let` names and `from` names"
    )
    sources: dict[Name, Word] | None = Field(None, alias="from", description=_FROM)
    arguments: dict[Name, Value | None] = Field({}, alias="with", description="numbers by name")
    where: WhereFile | None = Field(None, description="narrows the sites that `at` names")
    params: dict[Name, ParamFile] = Field({}, description="the tensors of the value, by name")
    let: dict[Name, Expression] = Field({}, description=_LET)
    expect: Annotated[int, Field(ge=0)] | None = Field(None, description="how many sites the entry must match")


class RuleFile(_Model):
    """A rule file."""

    version: Literal[1] = Field(alias="peftc", description="the format of rule files; this peftc reads 1")
    name: Word = Field(description="the rule's name")
    doc: str = Field("", description="what the method is, in a sentence")
    paper: str = Field("", description="where the method comes from")
    hyper: dict[Name, Value | Items | HyperFile] = Field({}, description="what --set may change, with defaults")
    extends: Word | None = Field(
        None, description="the rule that this one changes: a name of the library, or a .yaml file beside this one"
    )
    include: list[Word] = Field([], description="files of forms and patterns, relative to this one, for rows to name")
    forms: dict[Name, FormBody] = Field({}, description="the rule's own forms, by the name that rows give them")
    patterns: dict[Name, PatternBody] = Field({}, description="kinds of sites of the rule's own, words for `at`")
    carry: dict[Name, CarryFile] = Field(
        {}, description="values that are computed from layer to layer and modify nothing, for rows to read, by name"
    )
    deltas: dict[Name, DeltaFile] = Field({}, description="the rows of the table, by name")
    rewrite: dict[Name, RewriteFile] = Field(
        {}, description="sites of which several taps are replaced at once, by name"
    )
    train: Words = Field([], description="globs over the base's parameters that are trained as they are")
    tests: dict[Name, CaseFile] = Field({}, description="what must hold of the rule on built-in tiny models, by name")


class FormFile(FormBody):
    """A form file."""

    version: Literal[1] = Field(alias="peftc-form", description="the format of form files; this peftc reads 1")
    name: Word = Field(description="the form's name, that of its file")


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a mapping as they are written in a file."""
    return list(_fields(model))


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def check(tree: MappingNode, model: type[BaseModel], collector: Collector) -> MappingNode:
    """Report what in `tree` does not fit `model`: E003, E009, E010; the tree comes back without the misfits."""
    try:
        model.model_validate(plain(tree))
        return tree
    except ValidationError as error:
        found = complaints(tree, error.errors(include_url=False))
    meant: set[Path] = set()
    for complaint in sorted(found, key=lambda complaint: complaint.code):
        help = complaint.help
        if complaint.code == "E003":
            *owner, wrong = complaint.path
            known = keys_of(_model_at(model, tuple(owner)))
            help = help or _belongs(str(wrong)) or did_you_mean(str(wrong), known)
            meant |= {(*owner, key) for key in known if help == f"did you mean `{key}`?"}
        help = help or _told(model, complaint.path)
        if complaint.path not in meant:  # a misspelt key is not missing as well
            collector.error(complaint.code, complaint.message, span=complaint.span, help=help)
    pruned = without(tree, {complaint.path for complaint in found if complaint.code == "E009"})
    assert isinstance(pruned, MappingNode)
    return pruned


def _belongs(key: str) -> str | None:
    """Where a key stands that is right elsewhere."""
    if key == "<<":
        return "merge keys are not part of YAML 1.2: write the keys out"
    for model, place in (
        (DeltaFile, "in a row of `deltas`"),
        (RewriteFile, "in an entry of `rewrite`"),
        (WhereFile, "under `where` of a row"),
        (ParamFile, "in a parameter"),
        (InlineForm, "under `form` of a row"),
        (CaseFile, "in a test"),
        (RuleFile, "at the top of a rule"),
        (FormBody, "in a form"),
        (PatternBody, "in a pattern"),
    ):
        if key in _fields(model):
            return f"`{key}` stands {place}"
    return None


def _told(model: type[BaseModel], path: Path) -> str | None:
    """What the key at the end of `path` is for."""
    while path and isinstance(path[-1], int):  # an item of a list: the key of the list says what it is for
        path = path[:-1]
    owner, key = path[:-1], path[-1] if path else ""
    field = _fields(_model_at(model, owner)).get(str(key)) if isinstance(key, str) and _is_model(owner) else None
    return f"`{key}`: {field.description}" if field and field.description else None


def _is_model(path: Path) -> bool:
    """Whether the mapping at `path` has the keys of a model, and not names of the user's."""
    names = ("params", "deltas", "rewrite", "hyper", "forms", "let", "args", "with", "from", "set", "tests", "map")
    names += ("patterns", "taps", "shapes", "layers")
    return not path or path[-1] not in names


def _model_at(root: type[BaseModel], path: Path) -> type[BaseModel]:
    """The model of the mapping at `path`."""
    by_key = {"where": WhereFile, "not": WhereFile, "form": InlineForm, "attend": AttendFile, "same_as": SameAsFile}
    by_parent = {
        "params": ParamFile, "deltas": DeltaFile, "rewrite": RewriteFile, "hyper": HyperFile, "forms": FormBody,
        "tests": CaseFile, "patterns": PatternBody,
    }  # fmt: skip
    parent, last = ("", "", *path)[-2:]
    if parent in by_parent:
        return by_parent[str(parent)]
    return by_key.get(str(last), root)
