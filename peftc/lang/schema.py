"""The shape of rule and form files as pydantic models, and pydantic's complaints as diagnostics with places.

The models say which keys exist and what type their values have; a JSON Schema for editors is generated from them
(`RuleFile.model_json_schema()`). What the values mean is checked by `peftc.lang.build`. `check` reports each
mistake once, at the token that is wrong, and returns the tree without the wrong parts, so that checking can go on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.complaints import Path, complaints
from peftc.lang.tree import MappingNode, plain, without

Value = int | float | bool | str
Expression = Annotated[Value, Field(description="an expression")]
Word = Annotated[str, Field(min_length=1)]
Words = Word | list[Word]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
Stack = Literal["encoder", "decoder"]
Kind = Literal["self", "cross"]
Role = Literal["q", "k", "v", "qkv", "o", "up", "gate", "gate_up", "down", "other"]
LAYERS = r"^\s*(\d{1,6}\s*-\s*\d{1,6}|(first|last)\s+\d{1,6})\s*$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HyperFile(_Model):
    """A hyperparameter with bounds."""

    default: Value
    min: int | float | None = None
    max: int | float | None = None
    doc: str = ""


class ParamFile(_Model):
    """A tensor of a delta."""

    shape: list[Expression]
    init: Expression
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    share: Literal["site", "layer", "kind", "stack", "model"] = "site"
    frozen: bool = False
    condition: Expression | None = Field(None, alias="if")


class AttendFile(_Model):
    """The site's own queries attending to rows."""

    keys: Expression
    values: Expression


class WhereFile(_Model):
    """Which of the sites named by `at`."""

    layers: list[int] | int | Annotated[str, StringConstraints(pattern=LAYERS)] | None = None
    stack: Stack | list[Stack] | None = None
    kind: Kind | list[Kind] | None = None
    role: Role | list[Role] | None = None
    path: Words | None = None
    condition: Expression | None = Field(None, alias="if")


class InlineForm(_Model):
    """A form written in the row itself."""

    expr: Expression | None = None
    attend: AttendFile | None = None
    args: dict[Name, Value | None] = {}
    params: dict[Name, ParamFile] = {}
    let: dict[Name, Expression] = {}


class DeltaFile(_Model):
    """One row of the table."""

    at: Words
    modify: Words
    form: Value | InlineForm
    insert: Word = "parallel"
    compose: Expression = "h + dh"
    arguments: dict[Name, Value | None] = Field({}, alias="with")
    where: WhereFile | None = None
    params: dict[Name, ParamFile] = {}
    let: dict[Name, Expression] = {}
    lower: Literal["concat", "gated"] | None = None
    expect: Annotated[int, Field(ge=0)] | None = None


class RuleFile(_Model):
    """A rule file."""

    version: Literal[1] = Field(alias="peftc")
    name: Word
    doc: str = ""
    paper: str = ""
    hyper: dict[Name, Value | HyperFile] = {}
    deltas: dict[Name, DeltaFile] = {}
    train: Words = []


class FormFile(_Model):
    """A form file."""

    version: Literal[1] = Field(alias="peftc-form")
    name: Word
    doc: str = ""
    paper: str = ""
    args: dict[Name, Value | None] = {}
    params: dict[Name, ParamFile] = {}
    let: dict[Name, Expression] = {}
    dh: Expression | None = None
    attend: AttendFile | None = None


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a mapping as they are written in a file."""
    return [field.alias or name for name, field in model.model_fields.items()]


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
            help = help or did_you_mean(str(wrong), known)
            meant |= {(*owner, key) for key in known if help == f"did you mean `{key}`?"}
        if complaint.path not in meant:  # a misspelt key is not missing as well
            collector.error(complaint.code, complaint.message, span=complaint.span, help=help)
    pruned = without(tree, {complaint.path for complaint in found if complaint.code == "E009"})
    assert isinstance(pruned, MappingNode)
    return pruned


def _model_at(root: type[BaseModel], path: Path) -> type[BaseModel]:
    """The model of the mapping at `path`."""
    by_key = {"where": WhereFile, "form": InlineForm, "attend": AttendFile}
    by_parent = {"params": ParamFile, "deltas": DeltaFile, "hyper": HyperFile}
    parent, last = ("", "", *path)[-2:]
    if parent in by_parent:
        return by_parent[str(parent)]
    return by_key.get(str(last), root)
