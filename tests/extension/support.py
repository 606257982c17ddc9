"""Packages as an installer leaves them: a folder on the path, with metadata beside it. Nothing is fetched or built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "extension_package"


def install(site: Path, name: str, version: str, points: Mapping[str, str], files: Mapping[str, str] = {}) -> None:
    """Lay down a distribution: its `files`, and the dist-info with `points`, text of entry points by group."""
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
    written = "".join(f"[{group}]\n{text}\n\n" for group, text in points.items())
    (info / "entry_points.txt").write_text(written, encoding="utf-8")
    records = [f"{file.relative_to(site)},," for file in sorted(site.rglob("*")) if file.is_file()]
    (info / "RECORD").write_text("\n".join(records) + "\n", encoding="utf-8")


def install_example(site: Path) -> None:
    """The example package, with the name, the version and the entry points of its own pyproject.toml."""
    project = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    found = {key: re.search(rf'^{key} = "(.*)"$', project, re.MULTILINE) for key in ("name", "version")}
    name, version = (match[1] for match in found.values() if match)
    points = dict(re.findall(r'^\[project\.entry-points\."(.*)"\]\n(.*)$', project, re.MULTILINE))
    files = {
        str(file.relative_to(EXAMPLE)): file.read_text(encoding="utf-8")
        for file in (EXAMPLE / "peftc_squared").rglob("*")
        if file.suffix in (".py", ".yaml")
    }
    install(site, name, version, {group: text.replace('"', "") for group, text in points.items()}, files)
