"""The frontend: model class + config + input names -> `Program`, on the meta device.

The trace is made by transformers' own `DynamoExporter`, in train mode (so that dropout survives), with symbolic
batch and sequence axes and no weight anywhere: parameters live on the meta device, and only the buffers that a
model computes from its config (rotary frequencies, position ids) have values. One trace serves one set of inputs.

    skeleton = build_skeleton(LlamaForCausalLM, config)
    program = trace(skeleton, default_inputs(skeleton))
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.frontend.host_constants import HostConstants
from peftc.frontend.inputs import InputSpec, default_inputs, forward_arguments
from peftc.frontend.masks import masks_by_broadcasting
from peftc.frontend.noise import UNTRACEABLE, without_noise
from peftc.frontend.random_depth import without_random_depth
from peftc.ir.guards import guards_of
from peftc.ir.program import Program, is_call
from peftc.store.trace_cache import TraceCache, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    from peftc.frontend.cache import CacheLayout

__all__ = ["LABELS", "InputSpec", "Skeleton", "build_skeleton", "default_inputs", "forward_arguments", "trace"]

LABELS = "loss_labels"
"""The exporter refuses an input called `labels`; the graph's loss input has this name instead."""

SAMPLES = {
    "batch": 3,
    "sequence": 11,
    "target": 13,
    "past": 7,
    "window": 5,
    "total": 18,
    "target_total": 20,
    "images": 3,
    "sounds": 3,
}
"""Sample sizes: distinct, and unlikely to equal a model's own dimension. A total is what is past and what is new."""


@dataclass(slots=True)
class Skeleton:
    """A model without weights: parameters on meta, `buffers` with their values."""

    model: PreTrainedModel
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config


def build_skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None = None) -> Skeleton:
    """Build `cls(config)` with no memory for its parameters, in `dtype` (default: the config's)."""
    from accelerate import init_empty_weights

    stated = dtype or getattr(config, "dtype", None) or torch.float32
    chosen: torch.dtype = getattr(torch, stated) if isinstance(stated, str) else stated  # saving a config spells it out
    with _default_dtype(chosen), init_empty_weights(include_buffers=False):
        model = cls(config)
    model.tie_weights()  # under init_empty_weights every name would get a parameter of its own
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    torch.nn.Module.to(model, "meta")
    return Skeleton(model.train(), buffers)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def sample(spec: InputSpec, device: str = "meta") -> torch.Tensor:
    """A tensor of the sizes the trace is made with."""
    sizes: list[int] = [SAMPLES[size] if isinstance(size, str) else size for size in spec.sizes]
    return torch.ones(sizes, dtype=spec.dtype, device=device)


def _read(node: fx.Node) -> bool:
    """Whether anything but a chain of in-place detaches reads the node."""
    return any(
        user.op == "output" or not is_call(user, torch.ops.aten.detach_.default) or user.users for user in node.users
    )


def trace(
    skeleton: Skeleton,
    inputs: Mapping[str, InputSpec],
    flags: Mapping[str, Any] | None = None,
    layout: CacheLayout | None = None,
) -> Program:
    """Trace the skeleton for these inputs into a `Program`.

    `flags` are the non-tensor keyword arguments (`output_hidden_states`, ...). A `labels` input gives a graph whose
    first output is the loss. With a `layout` the inputs of `past_specs` are the model's cache, and the output
    `past_key_values` is a tuple of tensors, as `peftc.frontend.cache.kept` says. Raises `PeftcError` E038 when
    torch.export cannot trace the model.
    """
    # The exporter's module makes the classes of outputs known to torch, which a kept trace needs as well.
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    model = skeleton.model
    renamed = {LABELS if name == "labels" else name: spec for name, spec in inputs.items()}
    auto = torch.export.Dim.AUTO
    shapes = {n: {i: auto for i, size in enumerate(s.sizes) if isinstance(size, str)} for n, s in renamed.items()}
    tensors: dict[str, Any] = {name: sample(spec) for name, spec in renamed.items()}
    fixed = {"use_cache": layout is not None, **(flags or {})}
    cache = TraceCache.of_environment()
    with _experts_in_one_op(model):
        key = key_of(model, renamed, fixed)
        with quiet():
            exported = cache.read(key)
        if exported is None:
            settings = DynamoConfig(dynamic=True, dynamic_shapes=shapes)
            with quiet():
                exporter = DynamoExporter()
            program = _export(exporter, model, tensors, settings, fixed, layout)
            program.guards = guards_of(program, {name: spec.sizes for name, spec in renamed.items()})
            if program.guards is None:  # a file does not hold them
                with quiet():
                    cache.write(key, program.exported)
        else:
            program = Program.from_exported(exported)
    used = {binding.name for node, binding in program.bindings.items() if binding.kind == "constant" and _read(node)}
    for name, value in program.constants.items():
        if value.is_meta and value.numel() == 0:  # a list of nothing, such as an empty cache
            program.constants[name] = torch.empty(value.shape, dtype=value.dtype)
    lost = [name for name in used if program.constants[name].device.type == "meta"]
    if lost:
        fail("E038", f"{type(model).__name__} makes the constants {', '.join(lost)} on the device of its weights")
    program.tied = tied_names(model)
    program.fixed = _fixed_axes(program, renamed)
    return program


def _fixed_axes(program: Program, inputs: Mapping[str, InputSpec]) -> dict[str, int]:
    """The axes that should be symbols and are numbers in the graph, for code that loops over them was written out."""
    found: dict[str, int] = {}
    for name, node in program.placeholders("input").items():
        value = node.meta.get("val")
        if name in inputs and isinstance(value, torch.Tensor):
            for axis, size in zip(inputs[name].sizes, value.shape, strict=True):
                number = size if isinstance(size, int) else size.node.maybe_as_int()
                if isinstance(axis, str) and number is not None:
                    found[axis] = number
    return found


def _export(
    exporter: DynamoExporter,
    model: PreTrainedModel,
    tensors: Mapping[str, Any],
    settings: DynamoConfig,
    flags: Mapping[str, Any],
    layout: CacheLayout | None,
) -> Program:
    def made() -> Program:
        exported: Any = exporter.export(model, dict(tensors), config=settings)
        return Program.from_exported(getattr(exported, "program", exported))  # transformers 5.20 returns it bare

    with (
        quiet(),
        without_random_depth(model),
        HostConstants(),
        masks_by_broadcasting(),
        _called_with(model, flags, layout),
    ):
        try:
            return without_noise(model, made)
        except UNTRACEABLE as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            names = ", ".join("labels" if name == LABELS else name for name in tensors)
            fail(
                "E038",
                f"torch.export cannot trace {type(model).__name__} for the inputs {names}: {reason[0]}",
                help="try another head (--head) or other inputs; the model class itself must be traceable",
            )


@contextlib.contextmanager
def _experts_in_one_op(model: PreTrainedModel) -> Iterator[None]:
    """A loop over the experts that tokens chose depends on data, and has no graph: grouped products are the same."""
    looped = (
        getattr(model.config, "_experts_implementation", None) == "eager" and model._can_set_experts_implementation()
    )
    if looped:
        model.set_experts_implementation("grouped_mm")
    try:
        yield
    finally:
        if looped:
            model.set_experts_implementation("eager")


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Parameters that share a tensor: every later name to the first one."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _takes(model: PreTrainedModel, flag: str, accepted: tuple[str, ...]) -> bool:
    """Whether a flag may be passed. One among `kwargs` goes on to modules that may not know a cache."""
    known = flag != "use_cache" or model.can_generate() or hasattr(model.config, flag)
    return flag in accepted or ("kwargs" in accepted and known)


@contextlib.contextmanager
def _called_with(model: PreTrainedModel, flags: Mapping[str, Any], layout: CacheLayout | None) -> Iterator[None]:
    """Let the model take its labels under the name the exporter admits, its cache as tensors, flags as constants."""
    original = model.forward
    accepted = forward_arguments(type(model))
    fixed = {name: value for name, value in flags.items() if _takes(model, name, accepted)}

    def forward(**kwargs: Any) -> Any:
        if LABELS in kwargs:
            kwargs["labels"] = kwargs.pop(LABELS)
        if layout is None:
            return original(**kwargs, **fixed)
        from peftc.frontend.cache import kept, traced_cache

        past = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("past_")}
        result = original(**kwargs, past_key_values=traced_cache(layout, past), **fixed)
        result["past_key_values"] = kept(result["past_key_values"])
        return result

    model.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        model.forward = original  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers to itself: its reports, its progress bars, the exporter's notice that it is experimental.

    peftc says what matters of that in its own reports, and pins and tests the versions.
    """
    from transformers.utils import logging as reports

    logger = logging.getLogger("transformers")
    level, bars = logger.level, reports.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            reports.enable_progress_bar()
