"""Built-in tiny models of many families, for the tests in rules: random weights from a config, nothing is downloaded.

    subject = traced("decoder")     # a Llama of two layers
    program = subject.program()     # located, and free to be changed
    subject.run(program, subject.state)     # what it answers to three batches

Every family has two layers (an encoder-decoder two of each), width 32, 4 heads and FFNs of width 64, in float64, so
that most of what is counted is the same for all. Weights are large enough for every path to matter: attention is far
from uniform, no bias is zero and no norm is one. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program

HIDDEN, LAYERS, HEADS, FFN, VOCABULARY, POSITIONS = 32, 2, 4, 64, 99, 64

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": FFN, "max_position_embeddings": POSITIONS, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


@dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers with a small config; `model` is its class where a case names no head."""

    model_type: str
    model: str
    config: Mapping[str, Any]

    def raw_config(self) -> dict[str, Any]:
        """The config.json that such a model would have."""
        return {**self.config, "model_type": self.model_type, "architectures": [self.model]}


FAMILIES: dict[str, Family] = {
    "bert": Family("bert", "BertModel", _COMMON),
    "roberta": Family("roberta", "RobertaModel", _COMMON),
    "distilbert": Family(
        "distilbert",
        "DistilBertModel",
        {**_SMALL, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FFN,
         "max_position_embeddings": POSITIONS},
    ),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        {**_SMALL, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FFN, "n_positions": POSITIONS},
    ),
    "llama": Family("llama", "LlamaForCausalLM", _GROUPED),
    "mistral": Family("mistral", "MistralForCausalLM", {**_GROUPED, "sliding_window": 8}),
    "mixtral": Family("mixtral", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 0.5},
    ),
    "gpt_neox": Family("gpt_neox", "GPTNeoXForCausalLM", _COMMON),
    "phi3": Family("phi3", "Phi3ForCausalLM", {**_GROUPED, "original_max_position_embeddings": POSITIONS}),
    "t5": Family(
        "t5",
        "T5ForConditionalGeneration",
        {**_SMALL, "d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": FFN, "num_layers": LAYERS, "num_heads": HEADS,
         "decoder_start_token_id": 0},
    ),
    "bart": Family(
        "bart",
        "BartForConditionalGeneration",
        {**_SMALL, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": FFN,
         "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "decoder_ffn_dim": FFN,
         "max_position_embeddings": POSITIONS, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    ),
    "vit": Family(
        "vit",
        "ViTModel",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN,
         "image_size": 32, "patch_size": 8},
    ),
}  # fmt: skip
"""The families by name."""

ROLES = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "bart"}
"""Names by role, and the family each means."""

NAMES = (*FAMILIES, *ROLES)
"""What a test may say under `family`."""


@dataclass(slots=True)
class Subject:
    """A family's model, traced once: its weights, inputs, and what it answers without any delta."""

    family: Family
    skeleton: Skeleton
    located: Program
    """Located and never changed; `program` gives copies of it."""
    state: dict[str, torch.Tensor]
    """Parameters and buffers by name."""
    batches: list[dict[str, torch.Tensor]]
    outputs: list[list[torch.Tensor]] = field(default_factory=list)
    """What the base model answers to each batch."""
    bound: int = 0
    """What was known of the symbolic sizes when the trace was made."""

    def program(self) -> Program:
        """A copy of the located program, to be changed."""
        from peftc.ir.copying import copied

        return copied(self.located)

    def run(self, program: Program, state: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """The program's floating-point outputs for each batch, in evaluation mode, without rows of padding."""
        import torch

        from peftc.merging.certify import real_rows
        from peftc.runtime.executor import Executor

        executor = Executor(program, training=False, device=torch.device("cpu"))
        found: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for inputs in self.batches:
                tensors = [value for value in executor.flat(state, inputs) if isinstance(value, torch.Tensor)]
                found.append([real_rows(value, inputs) for value in tensors if value.is_floating_point()])
        return found


def traced(name: str, head: str | None = None) -> Subject:
    """The family `name` (or the one of that role) with a head, traced with the inputs people call it with.

    Raises `PeftcError` E032 when the family has no such head.
    """
    key = (ROLES.get(name, name), head)
    if key not in _TRACED:
        _TRACED[key] = _trace(FAMILIES[key[0]], head)
    return _TRACED[key]


_TRACED: dict[tuple[str, str | None], Subject] = {}


def forget_spoilt() -> None:
    """Forget traces whose symbolic sizes a rewrite has bound: copies share them, so later cases would see it."""
    for key in [key for key, subject in _TRACED.items() if _bound(subject.located) != subject.bound]:
        del _TRACED[key]


def _bound(program: Program) -> int:
    """How much is known of the symbolic sizes of a trace."""
    sizes = program.fake_mode.shape_env
    return 0 if sizes is None else len(sizes.guards) + len(sizes.replacements)


def _trace(family: Family, head: str | None) -> Subject:
    import torch

    from peftc.frontend.trace import build_skeleton, default_inputs
    from peftc.merging.certify import random_batches
    from peftc.pipeline import analyse
    from peftc.store.heads import resolve

    cls, config = resolve(family.raw_config(), f"family `{family.model_type}`", head)
    skeleton = build_skeleton(cls, config, torch.float64)
    specs = default_inputs(skeleton.model)
    program = analyse(skeleton, specs)
    batches = [dict(tensors) for _, tensors in random_batches(specs, VOCABULARY)]
    subject = Subject(family, skeleton, program, _weights(skeleton), batches, bound=_bound(program))
    subject.outputs = subject.run(program, subject.state)
    return subject


def _weights(skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """Noise for every parameter, around 1 for the scale of a norm; names that are tied share a tensor."""
    import torch

    generator = torch.Generator().manual_seed(1)
    made: dict[int, torch.Tensor] = {}
    state = dict(skeleton.buffers)
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = parameter.dim() == 1 and name.endswith("weight")
            made[id(parameter)] = 1 + 0.1 * noise if scale else 0.15 * noise
        state[name] = made[id(parameter)]
    return state
