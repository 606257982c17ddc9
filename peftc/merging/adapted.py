"""An adapted model as its directories hold it: rule, deltas, base, without its weights in memory.

Merging, exporting and verifying start from this. `read` gives a tensor at a time; `model`, for small models, is the
adapted model as `peftc.load` makes it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftc.frontend.trace import InputSpec, Skeleton, build_skeleton
from peftc.pipeline import analyse, rewrite
from peftc.planning.agreement import check_same
from peftc.runtime.api import check_fingerprint, load, load_base, new_parameters
from peftc.runtime.delta_dir import DeltaDir, check_names
from peftc.runtime.quantized import refuse_merge
from peftc.runtime.unfolded import Unfolded
from peftc.store.heads import resolve
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftc.frontend.cache import CacheLayout
    from peftc.ir.program import Program
    from peftc.planning.plan import Plan


@dataclass(frozen=True)
class Adapted:
    """`skeleton` is the base without weights, in the dtype in which transformers would load it."""

    delta: DeltaDir
    base: ModelDir
    base_class: type[PreTrainedModel]
    skeleton: Skeleton
    dtype: torch.dtype

    @staticmethod
    def open(directory: Path, base: str | Path | None) -> Adapted:
        """Open a delta directory and its base. Raises `PeftcError` E030 to E035, E055."""
        delta = DeltaDir.open(directory)
        refuse_merge(delta)
        source = ModelDir.open(delta.base_dir(base))
        source.refuse_adapted()
        source.require_weights()
        check_fingerprint(delta, source)
        reference = delta.manifest["base"]
        cls, config = resolve(source.config, source.path, reference["head"], reference["num_labels"])
        dtype = _loaded_dtype(config, source)
        config.dtype = dtype
        config.architectures = [cls.__name__]
        return Adapted(delta, source, cls, build_skeleton(cls, config, dtype), dtype)

    @functools.cached_property
    def fresh(self) -> frozenset[str]:
        """Parameters that the base does not hold: a new head."""
        return new_parameters(self.base, self.skeleton)

    def rewritten(
        self,
        specs: Mapping[str, InputSpec],
        skeleton: Skeleton | None = None,
        layout: CacheLayout | None = None,
        like: Plan | None = None,
    ) -> tuple[Program, Plan]:
        """The rewritten program for these inputs, and what was planned. A later trace, with a cache of this `layout`,
        is planned `like` the first. Raises `PeftcError` E038, E040, and what the rule says."""
        program = analyse(skeleton or self.skeleton, specs, None, layout)
        plan = rewrite(program, self.delta.rule, fresh=self.fresh, like=like)
        if like is not None:
            check_same(like, plan)
        check_names(
            self.delta.path,
            self.delta.header.tensors,
            {name: parameter.shape for name, parameter in plan.parameters.items()},
            {name: tuple(self.skeleton.model.get_parameter(name).shape) for name in plan.trained},
        )
        return program, plan

    def tensors(self, plan: Plan) -> Unfolded:
        """The tensors of the unfolded model, from disk."""
        return Unfolded(self.delta, self.base, self.skeleton, plan.trained)

    @functools.cached_property
    def model(self) -> Any:
        """The adapted model with its weights, in memory."""
        return load(self.delta.path, self.base.path)

    def base_model(self) -> Any:
        """The base without deltas, in memory; a head that is not stored starts as it did for the deltas."""
        reference = self.delta.manifest["base"]
        return load_base(self.base, reference["head"], reference["num_labels"], reference["seed"], self.dtype)[0].eval()


def _loaded_dtype(config: Any, base: ModelDir) -> torch.dtype:
    """What `from_pretrained(dtype="auto")` takes: the config's dtype, or that of the first floating tensor."""
    stated = getattr(config, "dtype", None)
    if stated is not None:
        return getattr(torch, stated) if isinstance(stated, str) else stated
    stored = (torch_dtype(info.dtype) for header in base.headers for info in header.tensors.values())
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)
