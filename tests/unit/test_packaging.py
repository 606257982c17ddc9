"""Every folder of code and every rule file is in the wheel, and the pinned versions satisfy the requirements."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def project_list(key: str) -> list[str]:
    """The list assigned to `key`; Python 3.10 has no tomllib, and a TOML list of strings is a Python list."""
    found = re.search(rf"^{key} = (\[.*?^\]|\[.*?\]$)", PROJECT, re.MULTILINE | re.DOTALL)
    assert found, key
    return ast.literal_eval(found[1])


def packages_on_disk() -> set[str]:
    folders = [("peftc", ROOT / "peftc"), ("peftc.passes", ROOT / "passes"), ("peftc.rules", ROOT / "rules")]
    packages = set()
    for name, folder in folders:
        for file in [*folder.rglob("*.py"), *folder.rglob("*.yaml"), *folder.rglob("*.json")]:
            packages.add(".".join([name, *file.parent.relative_to(folder).parts]))
    return packages


def test_every_folder_with_code_or_rules_is_packaged() -> None:
    assert packages_on_disk() <= set(project_list("packages"))


def test_pinned_versions_satisfy_the_requirements() -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name.lower().replace("_", "-"), []).append(pin)
    for text in project_list("dependencies"):
        need = Requirement(text)
        for python in ("3.10", "3.11", "3.13"):
            chosen = [p for p in pins[need.name] if p.marker is None or p.marker.evaluate({"python_version": python})]
            assert len(chosen) == 1, (need.name, python)
            applies = need.marker is None or need.marker.evaluate({"python_version": python})
            version = next(iter(chosen[0].specifier)).version
            assert not applies or need.specifier.contains(version), (text, python, version)
