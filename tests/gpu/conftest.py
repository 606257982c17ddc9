"""Tiny models on disk, for tests on a GPU."""

from runtime.conftest import model_dir

__all__ = ["model_dir"]
