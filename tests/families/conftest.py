"""Each family once: its model, its directory, its located program, and the models that rules made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import peftc
from families.family import FAMILIES, Family
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.program import Program
from peftc.pipeline import analyse

RULES = Path(__file__).parents[2] / "rules"
MAM = {"l": 3, "r": 5, "s": 2.0}


@dataclass(frozen=True)
class Subject:
    """A family's plain model and the directory that holds it."""

    family: Family
    model: Any
    directory: Path

    def apply(self, rule: str, **hyper: object) -> Any:
        return peftc.apply(RULES / f"{rule}.yaml", self.directory, set=hyper, seed=0)


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    family: Family = request.param
    model = family.build()
    directory = tmp_path_factory.mktemp(family.name) / "model"
    model.save_pretrained(directory)
    return Subject(family, model, directory)


@pytest.fixture(scope="session")
def located(subject: Subject) -> Callable[[], Program]:
    """The plain program, traced once for reading; a test that changes it must trace its own."""
    program = trace(subject)
    return lambda: program


def trace(subject: Subject) -> Program:
    skeleton = build_skeleton(type(subject.model), subject.model.config, subject.model.dtype)
    return analyse(skeleton, default_inputs(skeleton.model))


@pytest.fixture(scope="session")
def mam(subject: Subject) -> Any:
    """The family's model with rules/mam.yaml inserted, deltas at their initial values."""
    return subject.apply("mam", **MAM)
