"""The transformers backend: a plain checkpoint that `from_pretrained` loads without peftc.

Tensors are read, folded and written one at a time, into the shards they came from. Widened FFNs need a larger
intermediate size in the config; which of the config's numbers that is, is found by trying it on a model without
weights and comparing shapes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import Diagnostic, PeftcError, fail
from peftc.store.safetensors_io import Header, TensorSpec, dtype_code, read_tensor, torch_dtype, write

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from peftc.fold.decide import Decision
    from peftc.fold.state import FoldedState
    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program
    from peftc.ir.sites import Site
    from peftc.store.keys import KeyMap
    from peftc.store.model_dir import ModelDir

name = "hf"


def refuse_kept(decisions: list[Decision]) -> None:
    """A plain checkpoint holds no delta: name every one that stays, its node and the reason. Raises E037."""
    staying: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        if not decision.folds:
            staying.setdefault((decision.insertion.delta, decision.reason), []).append(decision)
    if staying:
        raise PeftcError(
            Diagnostic(
                "E037",
                f"delta `{delta}` stays in the graph at {group[0].where}"
                + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                + f" (node {group[0].node}): {reason}",
                help="a plain transformers checkpoint cannot hold it; `--export onnx` keeps it as a subgraph",
            )
            for (delta, reason), group in staying.items()
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was written: how many tensors were changed, copied and added."""

    changed: int
    copied: int
    added: int
    config: PreTrainedConfig


def emit(
    directory: Path,
    *,
    source: ModelDir,
    skeleton: Skeleton,
    program: Program,
    decisions: list[Decision],
    folded: FoldedState,
    trained: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Write config, tokenizer and folded shards into `directory`.

    `folded` gives every tensor of the folded model; `trained` are base tensors that the rule trained as they are.
    Raises `PeftcError` E037 when the checkpoint has no place for a tensor that changes, E042.
    """
    from peftc.store.keys import key_map

    config, padding = widened_config(skeleton, program, decisions)
    names = key_map(skeleton.model, source.shapes())
    touched = {*folded.touched, *trained, *padding}
    _refuse_converted(names.converted, touched)
    tensors = _Tensors(names, folded, touched, padding)
    head = [*names.missing, *names.mismatched]
    last = len(source.headers) - 1
    placed: dict[str, TensorSpec] = {}
    weight_map: dict[str, str] = {}
    for index, header in enumerate(source.headers):
        added = {state: tensors.value(state) for state in head} if index == last else {}
        entries = [tensors.spec(header, key) for key in header.tensors if key not in names.mismatched]
        entries += [TensorSpec(n, dtype_code(t.dtype), tuple(t.shape)) for n, t in added.items()]

        def produce(key: str, header: Header = header, added: Mapping[str, torch.Tensor] = added) -> torch.Tensor:
            return added[key] if key in added else tensors.read(header, key)

        write(directory / header.path.name, entries, produce, header.metadata or {"format": "pt"}, progress)
        placed.update({entry.name: entry for entry in entries})
        weight_map.update({entry.name: header.path.name for entry in entries})
    if len(source.headers) > 1:
        _write_index(directory, placed, weight_map)
    source.copy_support_files(directory)
    config.save_pretrained(directory)
    changed = sum(key in tensors.changed for key in placed)
    return Checkpoint(changed, len(placed) - changed - len(head), len(head), config)


@dataclass(slots=True)
class _Tensors:
    """The tensors of the new checkpoint by the names of the old one.

    A parameter with two names (tied weights) may be stored under one of them, or under both, and be changed under the
    other: `changed` says for every stored name that changes which state-dict name holds the new value.
    """

    names: KeyMap
    folded: FoldedState
    touched: set[str]
    padding: Mapping[str, Padding]
    changed: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        aliases = [*self.names.tied.items(), *self.names.stored_twice.items()]
        holder = {state: state for state in self.touched}
        for state, owner in aliases:
            for one, other in ((state, owner), (owner, state)):
                if one in self.touched:
                    holder.setdefault(other, one)
        stored = self.names.state_to_checkpoint.items()
        self.changed = {key: holder[state] for state, key in stored if state in holder}

    def value(self, state: str) -> torch.Tensor:
        tensor = self.folded(state)
        return self.padding[state].apply(tensor) if state in self.padding else tensor

    def spec(self, header: Header, key: str) -> TensorSpec:
        info = header.tensors[key]
        shape, state = info.shape, self.changed.get(key)
        if state is not None:
            shape = self.folded.shape(state, shape)
            shape = self.padding[state].shape(shape) if state in self.padding else shape
        return TensorSpec(key, info.dtype, shape)

    def read(self, header: Header, key: str) -> torch.Tensor:
        if key not in self.changed:
            return read_tensor(header, key)
        return self.value(self.changed[key]).to(torch_dtype(header.tensors[key].dtype))


def _refuse_converted(converted: Mapping[str, Any], touched: set[str]) -> None:
    blocked = sorted(touched & set(converted))
    if blocked:
        fail(
            "E037",
            f"{blocked[0]} is not stored as such in the checkpoint: it is {converted[blocked[0]].reason}",
            help="use `--export onnx`, or save the base once with this transformers and merge into that",
        )


def _write_index(directory: Path, placed: Mapping[str, TensorSpec], weight_map: Mapping[str, str]) -> None:
    total = sum(spec.nbytes for spec in placed.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


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
