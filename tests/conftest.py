"""Settings every test runs under: no model hub, no warning that goes unnamed (see `filterwarnings`), fixed seeds."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from typing import Any
from zlib import crc32

import pytest

# Before anything imports transformers or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


_TRACES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """One directory of traces for the workers of a run: none is left from another run, and each is made once."""
    if not hasattr(config, "workerinput"):
        config.stash[_TRACES] = directory = tempfile.TemporaryDirectory(prefix="peftc-traces-")
        os.environ["PEFTC_CACHE"] = directory.name


def pytest_unconfigure(config: pytest.Config) -> None:
    if (directory := config.stash.get(_TRACES, None)) is not None:
        directory.cleanup()


def _seed(name: str) -> None:
    """torch starts from another seed in each process, and a test would see what the tests before it drew."""
    random.seed(name)
    if "torch" in sys.modules:  # tests of the language import no torch
        sys.modules["torch"].manual_seed(crc32(name.encode()))


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Random values of a fixture are those of its name, whichever test asks first."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Random values of a test are the same in every run and any order."""
    _seed("test")
