"""Prefixes on one bare attention, for every form that the mask of a fused attention takes, against a formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from peftc.ir.program import Program
from peftc.lang.loader import load_rule
from peftc.passes.locate import Locate
from peftc.passes.normalize import Normalize
from peftc.pipeline import rewrite, run
from peftc.runtime.executor import Executor

RULES = Path(__file__).parents[2] / "rules"
HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 8, 3
D = HEADS * WIDTH
EXACT = 1e-12


class Attention(nn.Module):
    """One self attention. `kind` is the form of its mask: none, flag, bool, float, or rows (one entry per query)."""

    def __init__(self, kind: str, *, grouped: bool, scale: float | None) -> None:
        super().__init__()
        self.kind, self.grouped, self.scale = kind, grouped, scale
        kv = KV_HEADS if grouped else HEADS
        self.q, self.k, self.v = (nn.Linear(D, n * WIDTH, bias=False) for n in (HEADS, kv, kv))
        self.o = nn.Linear(D, D, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)

    def mask(self, x: Tensor) -> Tensor | None:
        """True where a query may look; each query may look at itself, and the last two keys are padding."""
        if self.kind in ("none", "flag"):
            return None
        ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        if self.kind == "rows":
            return ones[:, :1]
        seen = ones.tril()
        return seen if self.kind == "bool" else torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, float("-inf"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        heads = scaled_dot_product_attention(
            q, k, v, self.mask(x), is_causal=self.kind == "flag", scale=self.scale, enable_gqa=self.grouped
        )
        return x + self.o(heads.transpose(1, 2).flatten(2))

    def reference(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same with rows in front of keys and values; `keys`, `values` are [l, kv heads, width]."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        k, v = (torch.cat([p.transpose(0, 1).expand(len(x), -1, -1, -1), t], 2) for p, t in ((keys, k), (values, v)))
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(WIDTH) if self.scale is None else self.scale)
        if self.kind in ("flag", "bool", "float"):
            n = x.shape[1]
            seen = torch.cat([torch.ones(n, LENGTH, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool).tril()], 1)
            scores = scores.masked_fill(~seen, float("-inf"))
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def program_of(module: Attention) -> Program:
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        module, (torch.zeros(3, 11, D, dtype=torch.float64),), dynamic_shapes=({0: auto, 1: auto},)
    )
    program = Program.from_exported(exported)
    run(program, [Normalize(), Locate()])
    return program


@pytest.mark.parametrize("scale", [None, 0.5], ids=["default-scale", "scale"])
@pytest.mark.parametrize("grouped", [False, True], ids=["all-heads", "grouped"])
@pytest.mark.parametrize("kind", ["none", "flag", "bool", "float", "rows"])
@pytest.mark.parametrize("rule", ["prefix", "prefix_gated"])
def test_a_prefix_is_seen_by_every_query_and_changes_no_mask(
    rule: str, kind: str, grouped: bool, scale: float | None
) -> None:
    torch.manual_seed(0)
    module = Attention(kind, grouped=grouped, scale=scale).double()
    with torch.device("meta"):
        program = program_of(Attention(kind, grouped=grouped, scale=scale).double().to("meta"))
    (site,) = [site for site in program.sites if site.kind == "attention"]
    assert site.dims["kv_heads"] == (KV_HEADS if grouped else HEADS)
    assert site.causal == (kind in ("flag", "bool", "float"))
    plan = rewrite(program, load_rule(RULES / f"{rule}.yaml", {"l": LENGTH}))
    state: dict[str, Any] = dict(module.state_dict())
    for name, parameter in plan.parameters.items():
        state[name] = torch.randn(parameter.shape, dtype=torch.float64)
    keys, values = (next(v for name, v in state.items() if name.endswith(end)) for end in ("P_k", "P_v"))
    executor = Executor(program, training=False, device=torch.device("cpu"))
    for batch, length in ((2, 7), (1, 2), (3, 1)):
        x = torch.randn(batch, length, D, dtype=torch.float64)
        with torch.no_grad():
            (found,) = executor.flat(state, {"x": x})
            expected = module.reference(x, keys, values)
        assert (found - expected).abs().max() <= EXACT, (batch, length)
