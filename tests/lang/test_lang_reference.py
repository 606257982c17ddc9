"""rules/REFERENCE.md and the tables of rules/README.md are what peftc's own tables say, and leave nothing out."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from peftc.cli import app
from peftc.lang import site_docs
from peftc.lang.ops import INITS, LIBRARY_OPS
from peftc.lang.schema import DeltaFile, FormFile, RuleFile, keys_of
from peftc.lang.sites import COMPOSITIONS, DIMS, INSERTIONS, SITES
from peftc.reference.explain import ENTRIES
from peftc.reference.pages import filled, reference

RULES = Path(__file__).parents[2] / "rules"
PAGE = (RULES / "REFERENCE.md").read_text(encoding="utf-8")


def test_page_is_in_step() -> None:
    assert reference() == PAGE, "run: make reference"
    assert CliRunner().invoke(app, ["schema", "--markdown"]).output == PAGE


def test_tables_of_the_library_are_in_step() -> None:
    page = (RULES / "README.md").read_text(encoding="utf-8")
    assert filled(page) == page, "run: make reference"


def test_every_place_and_size_has_a_line() -> None:
    assert site_docs.SITE_DOCS.keys() == SITES.keys()
    assert {site: tuple(taps) for site, taps in site_docs.TAP_DOCS.items()} == SITES
    assert tuple(site_docs.DIM_DOCS) == DIMS
    assert tuple(site_docs.INSERTION_DOCS) == INSERTIONS
    assert tuple(site_docs.COMPOSITION_DOCS) == COMPOSITIONS


def test_every_key_op_initial_value_and_code_is_there() -> None:
    for model in (RuleFile, DeltaFile, FormFile):
        assert all(f"| `{key}` | " in PAGE for key in keys_of(model))
    assert all(f"| `{name}` | " in PAGE for name in [*LIBRARY_OPS, *INITS])
    assert all(f"- **{code}** " in PAGE for code in ENTRIES)
