"""Dtypes of deltas: what a parameter is stored in, and what a delta computes in.

1. A parameter of a delta is float32, on a float64 base float64. Its `dtype:` says otherwise: a dtype, or `base` for
   that of the value it changes. A model that is converted (`model.double()`) converts every parameter, those with a
   `dtype:` too, and is traced anew with the dtypes they then have.
2. A form computes in the widest dtype of the delta's parameters (float16 with bfloat16: float32), or in that of the
   base where it has none. What it reads of the base is cast to it once, and so is a narrower parameter.
3. `compose` and the row's `let` compute in the wider one of that and the dtype of h; the new value is cast back to the
   dtype of h, once. So a bfloat16 base with float32 deltas rounds h' once, as a merged weight would be. An entry of
   `rewrite` computes as a whole in the wider one of its parameters and of the taps that it sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peftc.ir.program import Program
    from peftc.lang.rule import Param


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The dtypes of a plan's parameters: `default` where the rule says nothing, `now` of those a model has already."""

    default: torch.dtype
    now: Mapping[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, now: Mapping[str, torch.dtype] | None = None) -> Dtypes:
        """Those of new deltas on the program's base."""
        import torch

        base = {node.meta["val"].dtype for node in program.placeholders("parameter").values()}
        return cls(torch.float64 if torch.float64 in base else torch.float32, now or {})

    def kind(self, param: Param, name: str, base: torch.dtype) -> torch.dtype:
        """The dtype of a parameter of that state-dict name, on a value of dtype `base`."""
        import torch

        written = base if param.dtype == "base" else getattr(torch, param.dtype) if param.dtype else self.default
        return self.now.get(name, written)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The narrowest dtype that holds all of them; None of nothing."""
    import torch

    found = list(dtypes)
    return reduce(torch.promote_types, found) if found else None
