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
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.lang.loader import load_rule, parse_rule
from peftc.merging.certify import random_batches
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
_NO_PAD = {**_SMALL, "pad_token_id": None}
_AUDIO = {
    **_SMALL, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_buckets": 20, "max_bucket_distance": 40,
}  # fmt: skip
_T5 = {
    "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),  # keys wider than values
    "modernbert": ("ModernBertForMaskedLM", {**_SMALL, "local_attention": 4, "global_attn_every_n_layers": 2}),
    "vit": ("ViTForImageClassification", {**_NO_PAD, "image_size": 16, "patch_size": 8}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "deberta_v2": (  # products of contents and positions; 3-D products of matrices between 4-D scores
        "DebertaV2ForMaskedLM",
        {**_SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    "xlnet": (  # the sequence in front; einsums; projections that are einsums
        "XLNetLMHeadModel",
        {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0},
    ),
    "funnel": (
        "FunnelForMaskedLM",
        {"vocab_size": 50, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1],
         "num_decoder_layers": 1, "pad_token_id": 0},
    ),
    "layoutlmv3": (  # a row's largest taken off, with a factor after it
        "LayoutLMv3Model",
        {**_SMALL, "coordinate_size": 5, "shape_size": 6, "visual_embed": False},
    ),
    "wavlm": ("WavLMForCTC", _AUDIO),  # products over batch times heads, behind the sequence
    "longt5": ("LongT5ForConditionalGeneration", {**_T5, "local_radius": 3}),  # queries in blocks
    "hiera": (  # units of tokens, the fused projection cut otherwise than in thirds
        "HieraForImageClassification",
        {"embed_dim": 8, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
         "depths": [1, 1], "num_heads": [2, 4], "masked_unit_size": [2, 2], "num_query_pool": 1,
         "query_stride": [2, 2]},
    ),
    "squeezebert": (  # projections that are convolutions
        "SqueezeBertForMaskedLM",
        {**_SMALL, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1,
         "intermediate_groups": 2, "output_groups": 2},
    ),
    "mgp_str": (
        "MgpstrForSceneTextRecognition",
        {**_NO_PAD, "image_size": [8, 12], "patch_size": 4, "mlp_ratio": 2, "max_token_length": 5,
         "num_character_labels": 7, "num_bpe_labels": 11, "num_wordpiece_labels": 9},
    ),
    "mpt": (  # ALiBi that counts from the last key
        "MptForCausalLM", {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40}
    ),
    "neomme": (  # a gate, and the part along a token's own value taken off, before W_o
        "NeoMMEForMaskedLM",
        {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "embedding_rank": 16, "embedding_dim": 16,
         "sliding_window": 4},
    ),
}  # fmt: skip
"""A class of transformers with a small config for each spelling of attention."""


class Model:
    """A family with a rule in it, its deltas filled with noise, beside the plain model of the same weights."""

    def __init__(self, name: str, rule: str, hyper: dict[str, Any]) -> None:
        base, self.state, self.inputs, self.plain = _subject(name)
        self.program = copied(base)
        plan = rewrite(self.program, load_rule(rule, hyper))
        noise = torch.Generator().manual_seed(3)
        self.deltas = {
            n: (0.5 * torch.randn(p.shape, generator=noise, dtype=_dtype(name))).requires_grad_()
            for n, p in sorted(plan.parameters.items())
        }

    def found(self) -> Tensor:
        """What the rewritten graph answers."""
        executor = Executor(self.program, training=False, device=torch.device("cpu"))
        return seen(self.inputs, executor.flat({**self.state, **self.deltas}, self.inputs)[0])

    def expected(self) -> Tensor:
        """What the plain model answers with the rows by hand."""
        sites = {name.partition(".peftc.")[0] for name in self.deltas if name.endswith("P_k")}
        own = {path: {n.rpartition(".")[2]: v for n, v in self.deltas.items() if n.startswith(f"{path}.peftc.")}
               for path in sites}  # fmt: skip
        rows = {path: (parts["P_k"], parts["P_v"]) for path, parts in own.items()}
        with attending(self.plain, rows) as model:
            return seen(self.inputs, model(**self.inputs)[0])

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
        found = torch.autograd.grad((output * noise).sum(), list(self.deltas.values()))
        return dict(zip(self.deltas, found, strict=True))


@lru_cache
def _subject(name: str) -> tuple[Program, dict[str, Tensor], dict[str, Tensor], nn.Module]:
    cls = getattr(transformers, CONFIGS[name][0])
    config = cls.config_class(**CONFIGS[name][1])
    skeleton = build_skeleton(cls, config, _dtype(name))
    specs = default_inputs(skeleton.model)
    program = analyse(skeleton, specs)
    drawn = random_state(skeleton, program)
    state = {n: v.to(_dtype(name)) if v.is_floating_point() else v for n, v in drawn.items()}
    model = cls(config).to(_dtype(name)).eval()
    model.load_state_dict({n: v for n, v in state.items() if n in model.state_dict()}, strict=True)
    inputs = dict(random_batches(specs, 19)[1][1])
    if name == "funnel":  # its trace is for one length
        inputs = {key: value[:, :11] for key, value in inputs.items()}
    return program, state, inputs, model


def _dtype(name: str) -> torch.dtype:
    """float64, but for XLNet, which multiplies positions in float32 by its weights."""
    return torch.float32 if name == "xlnet" else torch.float64


SINGLE = ("xlnet", "longt5", "funnel", "mpt")
"""XLNet makes its positions in float32, the others cast their scores to it, whatever the model's dtype."""
QUICK = ("deepseek_v3", "deberta_v2", "xlnet", "longt5", "wavlm", "squeezebert", "mpt")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS if name != "mgp_str"]


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_equals_attention_by_hand(name: str) -> None:
    with softmax_keeps_float64():
        model = Model(name, "prefix", {"l": ROWS})
        found, expected = model.found(), model.expected()
        exact = 1e-6 if name in SINGLE else EXACT
        assert (found - expected).abs().max() <= exact * expected.abs().max()
        gradients = model.gradients(found)
        for key, gradient in model.gradients(expected).items():
            assert gradient.abs().max() > 0, key
            assert (gradients[key] - gradient).abs().max() <= 100 * exact * gradient.abs().max(), key


LAYOUTS = {
    "xlnet": ("concat", "sbhd", "transformer.layer.{}.rel_attn", 0),
    "wavlm": ("v", "flat", "wavlm.encoder.layers.{}.attention.v_proj", 1),
    "squeezebert": ("q", "bds", "transformer.encoder.layers.{}.attention.query", 2),
}
"""A tap, its layout, the module whose output it is (of XLNet, what its core gives), and the axis of the sequence."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_delta_along_the_sequence_finds_it_in_any_layout(name: str) -> None:
    tap, layout, path, axis = LAYOUTS[name]
    base, state, inputs, plain = _subject(name)
    program = copied(base)
    row = f"{{at: attention, modify: {tap}, insert: sequential, form: 'flip(h, dim=1)', compose: h + s * dh}}"
    rewrite(program, parse_rule(f"peftc: 1\nname: turned\nhyper: {{s: 0.5}}\ndeltas:\n  d: {row}\n", "turned.yaml"))
    assert {edit.site.taps[tap].layout for edit in program.ledger} == {layout}
    with softmax_keeps_float64(), attending(plain, {}), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        found = Executor(program, training=False, device=torch.device("cpu")).flat(state, inputs)[0]
        for layer in range(2):
            module = plain.get_submodule(path.format(layer))
            own = module.rel_attn_core if name == "xlnet" else module.forward
            patch.setattr(module, "rel_attn_core" if name == "xlnet" else "forward", turned(own, axis))
        expected = plain(**inputs)[0]
    difference = seen(inputs, found - expected).abs().max()
    assert difference <= (1e-6 if name in SINGLE else EXACT) * expected.abs().max()


def turned(forward: Any, axis: int) -> Any:
    """The function with half of its answer, turned along the sequence, added to it."""

    def added(*args: Any, **kwargs: Any) -> Tensor:
        value = forward(*args, **kwargs)
        return value + 0.5 * value.flip(axis)

    return added


def seen(inputs: dict[str, Tensor], output: Tensor) -> Tensor:
    """The rows of an output that stand for tokens, not for padding."""
    mask = inputs.get("attention_mask")
    return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output


@pytest.mark.parametrize("name", ["hiera", "mgp_str"])
def test_lora_on_thirds_of_a_projection_whose_length_is_a_number(name: str) -> None:
    """Of an image; Hiera takes units of tokens out of queries, keys and values before it parts them."""
    base, state, inputs, plain = _subject(name)
    program = copied(base)
    plan = rewrite(program, load_rule("lora", {"r": 2}))
    noise = torch.Generator().manual_seed(3)
    filled = {n: torch.randn(p.shape, generator=noise, dtype=torch.float64) for n, p in sorted(plan.parameters.items())}
    found = Executor(program, training=False, device=torch.device("cpu")).flat({**state, **filled}, inputs)[0]
    scale = {edit.statics["alpha"] / edit.statics["r"] for edit in plan.edits}
    assert len(scale) == 1 and len(plan.edits) == 4
    assert {edit.site.taps[edit.tap].width for edit in plan.edits} <= {8, 16, 32}
    (factor,) = scale
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for path in {edit.site.path for edit in plan.edits}:
            module = plain.get_submodule(f"{path}.qkv")
            own = [{n: v for n, v in filled.items() if n.startswith(f"{path}.") and f".{tap}." in n} for tap in "qv"]
            patch.setattr(module, "forward", with_lora(module.forward, own, factor))
        expected = plain(**inputs)[0]
    expected = expected if isinstance(expected, Tensor) else expected[0]
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def with_lora(forward: Any, parts: list[dict[str, Tensor]], factor: float) -> Any:
    """A fused projection with LoRA on its first and its last third."""

    def added(x: Tensor) -> Tensor:
        thirds = list(forward(x).chunk(3, -1))
        for place, own in zip((0, 2), parts, strict=True):
            (a,), (b,) = ([v for n, v in own.items() if n.endswith(f".{name}")] for name in "AB")
            thirds[place] = thirds[place] + factor * (x @ a.T) @ b.T
        return torch.cat(thirds, -1)

    return added
