"""What the pages show is true: every YAML block is checked, every diagnostic is what peftc says, every command exists.

A YAML block with a file's name is that file of examples/custom_rule. Another block is a rule, a form or a pattern; one
without a header is part of a rule, and is checked in one that extends `lora`. `yaml E013` must end in that code.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from docs.blocks import ROOT, Block, blocks
from peftc.checking.check import check
from peftc.cli import app

PAGES = ["README.md", "ARCHITECTURE.md", "rules/LANGUAGE.md", "rules/README.md"]
STEPS = ROOT / "examples" / "custom_rule"
HEADER = "peftc: 1\nname: page\nextends: lora\n"
YAML = [block for page in PAGES for block in blocks(page, "yaml")]


def a_file(block: Block) -> bool:
    return block.about.endswith(".yaml")


@pytest.mark.parametrize("block", [block for block in YAML if not a_file(block)], ids=str)
def test_yaml_of_a_page_is_right_or_ends_in_the_code_it_says(block: Block, tmp_path: Path) -> None:
    whole = re.match(r"(#.*\n)*peftc(-\w+)?:", block.text) is not None
    file = tmp_path / "page.yaml"
    file.write_text(block.text if whole else HEADER + block.text, encoding="utf-8")
    found = check([str(file)]).files[0].diagnostics
    assert [d.code for d in found] == block.about.split(), "\n".join(d.render() for d in found)


@pytest.mark.parametrize("block", [block for block in YAML if a_file(block)], ids=str)
def test_yaml_of_a_step_is_the_file(block: Block) -> None:
    assert block.text == (STEPS / block.about).read_text(encoding="utf-8")


def test_language_page_shows_every_file_of_the_example() -> None:
    shown = {block.about for block in blocks("rules/LANGUAGE.md", "yaml") if a_file(block)}
    assert shown == {file.name for file in STEPS.glob("*.yaml")}


@pytest.mark.parametrize("block", blocks("rules/LANGUAGE.md", "text"), ids=str)
def test_text_of_a_step_is_what_check_says(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STEPS)
    result = CliRunner().invoke(app, ["check", block.about])
    assert (result.exit_code, result.stdout) == (2, block.text)


def test_steps_without_a_text_are_right() -> None:
    wrong = {block.about for block in blocks("rules/LANGUAGE.md", "text")}
    right = [str(file) for file in sorted(STEPS.glob("*.yaml")) if file.name not in wrong]
    report = check(right)
    assert len(right) >= 6
    assert report.summary == f"{len(right)} rules, 0 errors, 0 warnings"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page: str) -> None:
    lines = [line for block in blocks(page, "") for line in block.text.splitlines()]
    named = {match[1] for line in lines for match in re.finditer(r"(?:^|&& |\$ )peftc ([a-z]+)\b", line)}
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert named <= known


@pytest.mark.parametrize("page", [*PAGES, "rules/REFERENCE.md", "CHANGELOG.md"])
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, fragment = target.partition("#")
        place = (ROOT / page).parent / file if file else ROOT / page
        assert place.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in {_anchor(heading) for heading in headings}, target


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:peftc|passes|rules|examples|tests)/[\w./-]*)`", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


def _anchor(heading: str) -> str:
    kept = "".join(char for char in heading.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")
