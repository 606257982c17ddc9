"""A prefix against attention written out by hand, in float64: outputs, and gradients of every row.

The base model is transformers' own; its modules call the attention of `hand_written`, which knows of the rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from families.family import softmax_keeps_float64
from families.hand_written import attending
from peftc.certify import random_batches
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.lang.loader import load_rule
from peftc.pipeline import analyse, rewrite
from peftc.runtime.executor import Executor
from peftc.survey.weights import random_state

EXACT = 1e-12
ROWS = 3
_SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0,
    "vocab_size": 50,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, Any]] = {
    "deepseek_v3": (transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config(**_LATENT)),
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig(**_SMALL, local_attention=4, global_attn_every_n_layers=2),
    ),
    "vit": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**{**_SMALL, "pad_token_id": None}, image_size=16, patch_size=8),
    ),
}


class Model:
    """A family with a rule in it, its deltas filled with noise, beside the plain model of the same weights."""

    def __init__(self, name: str, rule: str, hyper: dict[str, Any]) -> None:
        base, self.state, self.inputs, self.plain = _subject(name)
        self.program = copied(base)
        plan = rewrite(self.program, load_rule(rule, hyper))
        noise = torch.Generator().manual_seed(3)
        self.deltas = {
            n: (0.5 * torch.randn(p.shape, generator=noise, dtype=torch.float64)).requires_grad_()
            for n, p in sorted(plan.parameters.items())
        }

    def found(self) -> Tensor:
        """What the rewritten graph answers."""
        executor = Executor(self.program, training=False, device=torch.device("cpu"))
        return self._seen(executor.flat({**self.state, **self.deltas}, self.inputs)[0])

    def expected(self) -> Tensor:
        """What the plain model answers with the rows by hand."""
        sites = {name.partition(".peftc.")[0] for name in self.deltas if name.endswith("P_k")}
        own = {path: {n.rpartition(".")[2]: v for n, v in self.deltas.items() if n.startswith(f"{path}.peftc.")}
               for path in sites}  # fmt: skip
        rows = {path: (parts["P_k"], parts["P_v"]) for path, parts in own.items()}
        with attending(self.plain, rows) as model:
            return self._seen(model(**self.inputs)[0])

    def _seen(self, output: Tensor) -> Tensor:
        mask = self.inputs.get("attention_mask")
        return output if mask is None or output.dim() < 3 else output[mask.bool()]

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        found = torch.autograd.grad((output * noise).sum(), list(self.deltas.values()))
        return dict(zip(self.deltas, found, strict=True))


@lru_cache
def _subject(name: str) -> tuple[Program, dict[str, Tensor], dict[str, Tensor], nn.Module]:
    cls, config = CONFIGS[name]
    skeleton = build_skeleton(cls, config, torch.float64)
    specs = default_inputs(skeleton.model)
    program = analyse(skeleton, specs)
    state = {n: v.double() if v.is_floating_point() else v for n, v in random_state(skeleton).items()}
    model = cls(config).double().eval()
    model.load_state_dict({n: v for n, v in state.items() if n in model.state_dict()}, strict=True)
    return program, state, dict(random_batches(specs, 19)[1][1]), model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefix_equals_attention_by_hand(name: str) -> None:
    with softmax_keeps_float64():
        model = Model(name, "prefix", {"l": ROWS})
        found, expected = model.found(), model.expected()
        assert (found - expected).abs().max() <= EXACT * expected.abs().max()
        gradients = model.gradients(found)
        for key, gradient in model.gradients(expected).items():
            assert gradient.abs().max() > 0, key
            assert (gradients[key] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), key
