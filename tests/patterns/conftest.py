"""The tiny models of tests/fold, on disk once a session."""

from fold.conftest import checkpoint

__all__ = ["checkpoint"]
