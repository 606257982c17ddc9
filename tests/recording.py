"""What the reference tests find, written down when PEFTC_MEASURED names a file: `make library` reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path


def record(rule: str, to: str, tolerance: float, **differences: float) -> None:
    """The largest differences between a rule and what it is held to: outputs, weights, gradients."""
    target = os.environ.get("PEFTC_MEASURED")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:  # one line in one write, for tests run side by side
            file.write(json.dumps({"rule": rule, "to": to, "tolerance": tolerance, **differences}) + "\n")
