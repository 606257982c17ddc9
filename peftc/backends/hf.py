"""The transformers backend: a plain checkpoint that `from_pretrained` loads without peftc.

Tensors are read, folded and written one at a time, into the shards they came from. Widened FFNs need a larger
intermediate size in the config; which of the config's numbers that is, is found by trying it on a model without
weights and comparing shapes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import PeftcError, fail
from peftc.store.safetensors_io import TensorSpec, dtype_code, read_tensor, write

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from peftc.fold.decide import Decision
    from peftc.fold.state import FoldedState
    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program
    from peftc.ir.sites import Site
    from peftc.store.model_dir import ModelDir

name = "hf"


def refuse_kept(decisions: list[Decision]) -> None:
    """A plain checkpoint holds no delta: name every one that stays, its node and the reason. Raises E037."""
    from peftc.diagnostics import Diagnostic

    staying: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        if decision.result in ("constant", "kept"):
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
    changed: Mapping[str, torch.Tensor],
    fresh: Callable[[str], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Write config, tokenizer and folded shards into `directory`.

    `changed` are base tensors that the rule trained; `fresh(name)` gives tensors the base checkpoint does not hold.
    """
    from peftc.store.keys import key_map

    config, padding = widened_config(skeleton, program, decisions)
    names = key_map(skeleton.model, source.shapes())
    touched = set(folded.touched) | set(changed)
    _refuse_converted(names.converted, touched)
    state_names = {key: state for state, key in names.state_to_checkpoint.items()}
    head = [*names.missing, *names.mismatched]
    dropped = {key for key in source.tensors if key not in state_names and key not in names.tied.values()}

    def value(state: str) -> torch.Tensor:
        tensor = changed[state] if state in changed else folded(state)
        return padding[state].apply(tensor) if state in padding else tensor

    def spec(key: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        state = state_names.get(key)
        if state is None:
            return TensorSpec(key, dtype, shape)
        grown = folded.shape(state, shape)
        return TensorSpec(key, dtype, padding[state].shape(grown) if state in padding else grown)

    written: dict[str, str] = {}
    for index, header in enumerate(source.headers):
        entries = [spec(k, i.dtype, i.shape) for k, i in header.tensors.items() if k not in names.mismatched]
        extra: dict[str, torch.Tensor] = {}
        if index == len(source.headers) - 1:
            extra = {state: changed[state] if state in changed else fresh(state) for state in head}
            entries = [entry for entry in entries if entry.name not in extra]
            entries += [TensorSpec(n, dtype_code(t.dtype), tuple(t.shape)) for n, t in extra.items()]

        def produce(key: str, header: Any = header, extra: dict[str, torch.Tensor] = extra) -> torch.Tensor:
            if key in extra:
                return extra[key]
            state = state_names.get(key)
            if state is not None and (state in touched or state in padding):
                return value(state).to(read_dtype(header, key))
            return read_tensor(header, key)

        write(directory / header.path.name, entries, produce, header.metadata or {"format": "pt"}, progress)
        written.update({entry.name: header.path.name for entry in entries})
    if len(source.headers) > 1:
        _write_index(directory, source, written)
    source.copy_support_files(directory)
    config.save_pretrained(directory)
    del dropped
    count = len(touched - set(head))
    return Checkpoint(count, len(written) - count - len(head), len(head), config)


def read_dtype(header: Any, key: str) -> torch.dtype:
    from peftc.store.safetensors_io import torch_dtype

    return torch_dtype(header.tensors[key].dtype)


def _refuse_converted(converted: Mapping[str, Any], touched: set[str]) -> None:
    blocked = sorted(touched & set(converted))
    if blocked:
        fail(
            "E037",
            f"{blocked[0]} is not stored as such in the checkpoint: it is {converted[blocked[0]].reason}",
            help="use `--export onnx`, or save the base once with this transformers and merge into that",
        )


def _write_index(directory: Path, source: ModelDir, written: Mapping[str, str]) -> None:
    total = sum(spec.stat().st_size for spec in directory.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))}
    name = next(source.path.glob("*.safetensors.index.json")).name
    (directory / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Padding:
    """Zeros at the end of an axis: hidden units that do nothing, where other layers have more."""

    axis: int
    amount: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        grown = list(shape)
        grown[self.axis] += self.amount
        return tuple(grown)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        extra = list(tensor.shape)
        extra[self.axis] = self.amount
        return torch.cat([tensor, torch.zeros(extra, dtype=tensor.dtype)], self.axis)


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
    ffns = {site.linears["down"].weight_name: site for site in program.sites if site.kind == "ffn"}
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
        if role == "gate_up":
            fail("E037", f"{linear.weight_name} is fused: layers of different width cannot be padded", help="use --export onnx")
        rows = role != "down"
        padding[linear.weight_name] = Padding(int(rows == linear.transposed), amount)
        if rows and linear.bias_name is not None:
            padding[linear.bias_name] = Padding(0, amount)
    return padding
