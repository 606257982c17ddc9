"""Single parameters of a base model, read from its checkpoint by state-dict name, for starts that are made of them.

    read = BaseWeights(base, skeleton.model)
    read("encoder.layer.0.attention.self.query.weight")    # this tensor alone

Tied names and names of an older day are followed; a tensor that transformers computes while it loads is refused.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import fail
from peftc.store.keys import KeyMap, key_map
from peftc.store.model_dir import CONFIG, WEIGHTS, ModelDir

if TYPE_CHECKING:
    import torch

_FROM_MODEL = "peftc.apply in Python reads the weights of the loaded model instead"


class BaseWeights:
    """Reads parameters of `model`, which may be on the meta device, from the checkpoint at `base`."""

    def __init__(self, base: ModelDir, model: Any) -> None:
        self._base = base
        self._model = model

    @cached_property
    def _names(self) -> KeyMap:
        return key_map(self._model, self._base.shapes())

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor as it is stored.

        Raises:
            PeftcError: E030, there are no weights; E031, the file cannot be read; E040, this parameter is not stored.
        """
        if not self._base.has_weights:
            message = f"the rule starts from weights of the base, and {self._base.path} holds only {CONFIG}"
            fail("E030", message, help=f"put {WEIGHTS} beside {CONFIG}, or choose a random start")
        names = self._names
        owner = names.tied.get(name, name)
        if owner in names.state_to_checkpoint:
            return self._base.read(names.state_to_checkpoint[owner])
        if owner in names.converted:
            reason = f"transformers makes it while loading ({names.converted[owner].reason})"
            fail("E040", f"{self._base.path} does not hold {name} as it is: {reason}", help=_FROM_MODEL)
        message = f"{self._base.path} does not hold {name}, which the rule starts from"
        fail("E040", message, help="narrow the sites with `where`; a new head has no weights yet")
