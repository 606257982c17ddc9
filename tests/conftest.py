"""Settings every test runs under: no model hub, and no warning that goes unnamed (see `filterwarnings`)."""

from __future__ import annotations

import os
import tempfile

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
