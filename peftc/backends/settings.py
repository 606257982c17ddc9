"""Settings of a config under which the same class has parameters that it lacks: a bias beside a weight, or tied ones
apart.

Which setting it is, is found by trying it on a model without weights and comparing names, as for a widened FFN.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftc.frontend.trace import build_skeleton, tied_names

if TYPE_CHECKING:
    from peftc.frontend.trace import Skeleton

Shape = tuple[int, ...]
_TIE = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Settings:
    """`values` are set in the config. `biases` gives for a weight the bias that its layer then has, `zeros` every
    parameter that appears, with its shape: zeros there change nothing. `apart` are tied names that then hold a tensor
    of their own."""

    values: Mapping[str, bool] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, Shape] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()

    def applied(self, config: Any) -> Any:
        """A copy of a config with the values set."""
        changed = copy.deepcopy(config)
        for name, value in self.values.items():
            setattr(changed, name, value)
        return changed


def settings_for(skeleton: Skeleton, *, biases: Collection[str] = (), untie: bool = False) -> Settings:
    """The settings that give the linear layers with these weights a bias, as far as there are any, and, on request,
    take tied names apart."""
    values: dict[str, bool] = {}
    zeros: dict[str, Shape] = {}
    for attribute in _bias_attributes(skeleton.config) if biases else ():
        appearing = _appearing(skeleton, attribute)
        if appearing and any(_bias_of(weight) in appearing for weight in biases):
            values[attribute] = True
            zeros |= appearing
    found = {weight: _bias_of(weight) for weight in biases if _bias_of(weight) in zeros}
    apart: frozenset[str] = frozenset()
    if untie and getattr(skeleton.config, _TIE, False):
        tied = tied_names(skeleton.model)
        apart = frozenset(tied) - frozenset(tied_names(_built(skeleton, _TIE, False)))
        values |= {_TIE: False} if apart else {}
    return Settings(values, found, zeros, apart)


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _bias_attributes(config: Any) -> list[str]:
    return [key for key, value in config.to_dict().items() if "bias" in key and value is False]


def _appearing(skeleton: Skeleton, attribute: str) -> dict[str, Shape]:
    """The parameters that appear with an attribute set, where these are biases of linear layers and nothing else
    changes."""
    import torch

    try:
        model = _built(skeleton, attribute, True)
    except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError):
        return {}
    before = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()}
    after = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new = {name: shape for name, shape in after.items() if name not in before}
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in new]
    plain = all(isinstance(m, torch.nn.Linear) and n.endswith(".bias") for m, n in zip(owners, new, strict=True))
    return new if plain and before.items() <= after.items() else {}


def _built(skeleton: Skeleton, attribute: str, value: bool) -> Any:
    config = copy.deepcopy(skeleton.config)
    setattr(config, attribute, value)
    return build_skeleton(type(skeleton.model), config).model
