"""peftc: a compiler from YAML rules to parameter-efficient finetuning.

The names below load on first use, so that `import peftc` costs nothing and a reading command never pays for torch.

    model = peftc.apply("mam", "path/to/model", set={"r": 64})
    model = peftc.load("peftc-out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftc.diagnostics import PeftcError
    from peftc.lang.loader import load_rule
    from peftc.runtime.api import apply, load
    from peftc.runtime.checkpoints import last_checkpoint
    from peftc.runtime.groups import parameter_groups

__version__ = "0.1.0"

_HOMES = {
    "PeftcError": "peftc.diagnostics",
    "apply": "peftc.runtime.api",
    "last_checkpoint": "peftc.runtime.checkpoints",
    "load": "peftc.runtime.api",
    "load_rule": "peftc.lang.loader",
    "parameter_groups": "peftc.runtime.groups",
}

__all__ = ["PeftcError", "__version__", "apply", "last_checkpoint", "load", "load_rule", "parameter_groups"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
