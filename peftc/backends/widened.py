"""The config of a widened model: which of its numbers grow, and the zeros that give all FFNs of one size one width.

A wider FFN needs a larger intermediate size in the config; which of the config's numbers that is, is found by trying
it on a model without weights and comparing shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftc.diagnostics import fail

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from peftc.fold.decide import Decision
    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program
    from peftc.ir.sites import Site


@dataclass(frozen=True, slots=True)
class Padding:
    """Zeros at the end of an axis: hidden units that do nothing, where other layers have more.

    An axis that holds several streams, one after the other (`blocks`), is padded at the end of each.
    """

    axis: int
    amount: int
    blocks: int = 1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        grown = list(shape)
        grown[self.axis] += self.amount * self.blocks
        return tuple(grown)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        extra = list(tensor.shape)
        extra[self.axis] = self.amount
        zeros = torch.zeros(extra, dtype=tensor.dtype)
        pieces = [piece for block in tensor.chunk(self.blocks, self.axis) for piece in (block, zeros)]
        return torch.cat(pieces, self.axis)


def widened_config(
    skeleton: Skeleton, program: Program, decisions: list[Decision]
) -> tuple[PreTrainedConfig, dict[str, Padding]]:
    """The config of the folded model, and the padding that gives all FFNs of one size in the config one width.

    Raises `PeftcError` E037 when no number of the config is the width of these FFNs alone.
    """
    config = copy.deepcopy(skeleton.config)
    ranks: dict[str, int] = {}
    for decision in decisions:
        if decision.widening is not None:
            path = decision.insertion.site.linears["down"].weight_name
            ranks[path] = ranks.get(path, 0) + decision.widening.rank
    padding: dict[str, Padding] = {}
    if not ranks:
        return config, padding
    ffns = {site.linears["down"].weight_name: site for site in program.sites if site.kind == "ffn" and site.linears}
    left = dict(ranks)
    for attribute in _width_attributes(config, {int(ffns[down].dims["d_ff"]) for down in ranks}):
        affected = _affected(skeleton, attribute, ffns)
        group = [down for down in affected if down in left] if affected else []
        if not group:
            continue
        width = int(ffns[group[0]].dims["d_ff"])
        most = max(ranks[down] for down in group)
        setattr(config, attribute, width + most)
        for down in affected or ():
            padding.update(_pad(ffns[down], most - ranks.get(down, 0)))
            left.pop(down, None)
    if left:
        site = ffns[next(iter(left))]
        fail(
            "E037",
            f"no number in the config is the width of {site.describe()} alone, so the widened model has no config",
            help="`--export onnx` needs none",
        )
    return config, padding


def _width_attributes(config: PreTrainedConfig, widths: set[int]) -> list[str]:
    values = config.to_dict()
    named = [key for key, value in values.items() if isinstance(value, int) and value in widths]
    return [*named, *(key for key, value in values.items() if value is None and "inner" in key)]


def _affected(skeleton: Skeleton, attribute: str, ffns: Mapping[str, Site]) -> list[str] | None:
    """The FFNs (by their down weight) that grow with `attribute`, or None when anything else changes as well."""
    from peftc.frontend.trace import build_skeleton

    trial = copy.deepcopy(skeleton.config)
    widths = {int(site.dims["d_ff"]) for site in ffns.values()}
    setattr(trial, attribute, (getattr(trial, attribute) or max(widths)) + 8)
    try:
        model: PreTrainedModel = build_skeleton(type(skeleton.model), trial).model
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return None
    before = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()}
    after = {name: tuple(p.shape) for name, p in model.named_parameters()}
    changed = {name for name in before if before[name] != after.get(name)}
    own: dict[str, set[str]] = {down: set() for down in ffns}
    for down, site in ffns.items():
        for linear in site.linears.values():
            own[down].update(n for n in (linear.weight_name, linear.bias_name) if n is not None)
    affected = [down for down in ffns if down in changed]
    return affected if changed and changed <= set().union(*(own[down] for down in affected)) else None


def _pad(site: Site, amount: int) -> dict[str, Padding]:
    if amount == 0:
        return {}
    padding: dict[str, Padding] = {}
    for role, linear in site.linears.items():
        rows, blocks = role != "down", 2 if role == "gate_up" else 1
        padding[linear.weight_name] = Padding(int(rows == linear.transposed), amount, blocks)
        if rows and linear.bias_name is not None:
            padding[linear.bias_name] = Padding(0, amount, blocks)
    return padding
