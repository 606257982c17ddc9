"""Spellings of attention and FFN that few families have, each on one tiny model of such a family."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from peftc.diagnostics import PeftcError
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.copying import copied
from peftc.ir.program import Program, is_call
from peftc.ir.sites import Site
from peftc.lang.loader import load_rule, parse_rule
from peftc.merging.certify import random_batches
from peftc.pipeline import analyse, rewrite
from peftc.runtime.executor import Executor
from peftc.survey.measure import _subject
from peftc.survey.record import Record
from peftc.survey.weights import random_state

TOLERANCE = 1e-5
CONFIGS: dict[str, tuple[Any, Any]] = {
    "gpt_oss": (  # a column of sinks beside the scores; experts as stacked weights
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=50, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"], attn_implementation="eager", pad_token_id=0,
        ),
    ),
    "deepseek_v3": (  # latent attention: keys wider than values; a mixture beside a shared expert
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
            moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, vocab_size=50, pad_token_id=0,
        ),
    ),
    "mixtral": (  # divides the weights of the chosen experts in place
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
            num_local_experts=4, num_experts_per_tok=2, vocab_size=50, pad_token_id=0,
        ),
    ),
    "openai-gpt": (  # scores are multiplied by the mask
        transformers.OpenAIGPTLMHeadModel,
        transformers.OpenAIGPTConfig(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=50),
    ),
    "segformer": (  # a convolution by channel inside the FFN; fewer keys than queries
        transformers.SegformerForImageClassification,
        transformers.SegformerConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 1, 2, 4], image_size=64
        ),
    ),
    "cvt": (  # queries, keys and values by convolutions; in the last stage beside a class token
        transformers.CvtForImageClassification,
        transformers.CvtConfig(embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    ),
    "diffllama": (  # the difference of two softmaxes
        transformers.DiffLlamaForCausalLM,
        transformers.DiffLlamaConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            vocab_size=50, pad_token_id=0,
        ),
    ),
    "zaya": (  # queries and keys mixed by a convolution; values from two projections
        transformers.ZayaForCausalLM,
        transformers.ZayaConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            moe_intermediate_size=16, num_experts=4, router_hidden_size=16, vocab_size=50, pad_token_id=0,
        ),
    ),
    "zamba": (  # an FFN behind an attention with no sum between them; layers of other kinds
        transformers.ZambaForCausalLM,
        transformers.ZambaConfig(
            num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"], hidden_size=32,
            attention_hidden_size=64, intermediate_size=48, num_attention_heads=4, attention_head_dim=16,
            num_key_value_heads=4, n_mamba_heads=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
            vocab_size=50, pad_token_id=0,
        ),
    ),
    "zamba2": (  # the same, with a low-rank side path in the up projection
        transformers.Zamba2ForCausalLM,
        transformers.Zamba2Config(
            num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], hidden_size=32, intermediate_size=48,
            num_attention_heads=4, mamba_d_state=4, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1,
            num_mem_blocks=1, adapter_rank=4, use_shared_mlp_adapter=True, chunk_size=8, vocab_size=50, pad_token_id=0,
        ),
    ),
    "mamba": (  # no attention, no FFN; a weight that a fused kernel is given where there is one
        transformers.MambaForCausalLM,
        transformers.MambaConfig(
            num_hidden_layers=2, hidden_size=32, state_size=4, time_step_rank=4, vocab_size=50, pad_token_id=0
        ),
    ),
    "unispeech": (  # skips layers at random in training
        transformers.UniSpeechForCTC,
        transformers.UniSpeechConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, layerdrop=0.5,
            conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, vocab_size=20,
        ),
    ),
}  # fmt: skip


@lru_cache
def located(name: str) -> tuple[Program, dict[str, Tensor], dict[str, Tensor]]:
    """A family's program, random weights, and a batch."""
    cls, config = CONFIGS[name]
    skeleton = build_skeleton(cls, config, torch.float32)
    specs = default_inputs(skeleton.model)
    program = analyse(skeleton, specs)
    inputs = dict(random_batches(specs, 19)[1][1])
    if name == "zamba":  # the slow path of its mixer is traced for one length, step by step
        inputs = {key: value[:, :11] for key, value in inputs.items()}
    return program, random_state(skeleton, program), inputs


def of_kind(name: str, kind: str) -> list[Site]:
    return [site for site in located(name)[0].sites if site.kind == kind]


def answer(program: Program, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return Executor(program, training=False, device=torch.device("cpu")).flat(state, inputs)[0]


@pytest.mark.parametrize("name", ["gpt_oss", "openai-gpt"])
def test_a_prefix_as_longer_keys_equals_the_gated_sum(name: str) -> None:
    base, state, inputs = located(name)
    answers = []
    for rule in ("prefix", "prefix_gated"):
        program = copied(base)
        plan = rewrite(program, load_rule(rule, {"l": 3}))
        assert {entry.lowering for entry in program.ledger} == {"concat" if rule == "prefix" else "gated"}
        generator = torch.Generator().manual_seed(3)
        filled = {n: torch.randn(p.shape, generator=generator) for n, p in sorted(plan.parameters.items())}
        answers.append(answer(program, {**state, **filled}, inputs))
    assert (answers[0] - answers[1]).abs().max() <= TOLERANCE * answers[0].abs().max()
    assert (answers[0] - answer(base, state, inputs)).abs().max() > 1e-2


def test_an_ffn_with_a_convolution_by_channel_is_one_site() -> None:
    assert len(of_kind("segformer", "ffn")) == len(of_kind("segformer", "attention")) == 4
    assert {site.variant for site in of_kind("segformer", "attention")} == {"self"}


def test_an_attention_over_an_image_and_its_class_token_is_one_over_itself() -> None:
    assert [site.variant for site in of_kind("cvt", "attention")] == 6 * ["self"]


def test_layers_that_are_dropped_at_random_are_all_in_the_graph() -> None:
    assert len(of_kind("unispeech", "attention")) == len(of_kind("unispeech", "ffn")) == 2
    assert CONFIGS["unispeech"][1].layerdrop == 0.5


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mixtral"])
def test_the_graph_of_a_mixture_writes_into_no_value(name: str) -> None:
    """ONNX has no such ops, and what is written into a slice is lost to a walk along the dataflow."""
    targets = [node.target for node in located(name)[0].graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert [target for target in targets if target._schema.is_mutable] == []


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mixtral"])
def test_the_graph_of_a_mixture_answers_as_the_model_does(name: str) -> None:
    """Its counts are floats here, and keys that are filled piece by piece are one `cat`."""
    program, state, inputs = located(name)
    cls, config = CONFIGS[name]
    model = cls(config).eval()
    model.load_state_dict({n: v for n, v in state.items() if n in model.state_dict()}, strict=True)
    with torch.no_grad():
        expected = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    assert (answer(program, state, inputs) - expected)[seen].abs().max() <= TOLERANCE * expected.abs().max()


def test_a_mixture_of_experts_is_an_ffn_without_taps_inside() -> None:
    sites = of_kind("gpt_oss", "ffn")
    assert [site.path for site in sites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(set(site.taps) == {"x", "out", "residual"} for site in sites)
    assert all(set(site.missing) == {"gate", "up", "mid"} for site in sites)
    assert sites[0].dims["d_ff"] == 16 and sites[0].dims["gated"]


SHARED = "model.layers.{}.shared_transf.feed_forward"


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("gpt_oss", ("model.layers.0.mlp", "model.layers.1.mlp")),
        ("zamba", (SHARED.format(1), SHARED.format(2))),
        ("zamba2", ("model.layers.1.shared_transformer.feed_forward",)),
    ],
    ids=["gpt_oss", "zamba", "zamba2"],
)
def test_an_adapter_beside_an_ffn_reads_its_input_and_changes_its_result(name: str, paths: tuple[str, ...]) -> None:
    base, state, inputs = located(name)
    program = copied(base)
    plan = rewrite(program, load_rule("pa_ffn", {"r": 4}))
    assert {edit.site.path for edit in plan.edits} == set(paths)
    generator = torch.Generator().manual_seed(3)
    filled = {n: torch.randn(p.shape, generator=generator) for n, p in sorted(plan.parameters.items())}
    cls, config = CONFIGS[name]
    model = cls(config).eval()
    model.load_state_dict({n: v for n, v in state.items() if n in model.state_dict()}, strict=True)
    for path in paths:
        own = {n.rpartition(".")[2]: v for n, v in filled.items() if n.startswith(f"{path}.peftc.")}
        model.get_submodule(path).register_forward_hook(beside(own))
    with torch.no_grad():
        expected = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    found = answer(program, {**state, **filled}, inputs)
    assert (found - expected)[seen].abs().max() <= TOLERANCE * expected.abs().max()


def beside(weights: dict[str, Tensor]) -> Any:
    """A hook that adds a ReLU bottleneck of the module's input to its first output."""

    def hook(_: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...] | Tensor) -> Any:
        hidden = torch.relu(torch.nn.functional.linear(args[0], weights["W_down"], weights["b_down"]))
        delta = torch.nn.functional.linear(hidden, weights["W_up"], weights["b_up"])
        return output + delta if isinstance(output, Tensor) else (output[0] + delta, *output[1:])

    return hook


def test_latent_attention_has_its_taps_and_one_ffn_a_layer() -> None:
    for site in of_kind("deepseek_v3", "attention"):
        assert site.variant == "self" and site.causal
        assert {"q", "k", "v", "ctx", "out"} <= set(site.taps)
    assert len(of_kind("deepseek_v3", "ffn")) == 2


def test_a_prefix_of_one_width_is_refused_where_keys_are_wider_than_values() -> None:
    rows = "{P: {shape: [l, kv_heads, head_dim], init: zeros}}"
    row = f"{{at: attention, modify: heads, form: {{params: {rows}, attend: {{keys: P, values: P}}}}, compose: gate}}"
    rule = parse_rule(f"peftc: 1\nname: narrow\nhyper: {{l: 3}}\ndeltas:\n  p: {row}\n", "narrow.yaml")
    with pytest.raises(PeftcError) as caught:
        rewrite(copied(located("deepseek_v3")[0]), rule)
    (told,) = caught.value.diagnostics
    assert told.code == "E013" and "keys of width 16 and values of width 8" in told.message
    assert told.help is not None and "`key_dim`" in told.help


def test_mam_applies_to_latent_attention_with_keys_wider_than_values() -> None:
    program = copied(located("deepseek_v3")[0])
    plan = rewrite(program, load_rule("mam", {"l": 3, "r": 4}))
    shapes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in plan.parameters.items()}
    assert (shapes["P_k"], shapes["P_v"]) == ((3, 4, 16), (3, 4, 8))


def test_a_prefix_is_seen_by_both_halves_of_a_difference_of_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: each of the two calls gets the keys, and its own half of the values."""
    base, state, inputs = located("diffllama")
    sites = of_kind("diffllama", "attention")
    assert [site.path for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all({"x", "q", "k", "v", "heads", "out"} <= set(site.taps) for site in sites)
    assert all(site.variant == "self" and site.causal for site in sites)
    program = copied(base)
    plan = rewrite(program, load_rule("prefix", {"l": 3}))
    cls, config = CONFIGS["diffllama"]
    skeleton = build_skeleton(cls, cls.config_class.from_dict({**config.to_dict(), "_attn_implementation": "eager"}))
    spelled_out = analyse(skeleton, default_inputs(skeleton.model))
    rewrite(spelled_out, load_rule("prefix", {"l": 3}))
    assert any(is_call(node, torch.ops.aten.softmax.int) for node in spelled_out.graph.nodes)
    generator = torch.Generator().manual_seed(3)
    rows = {n: torch.randn(p.shape, generator=generator) for n, p in sorted(plan.parameters.items())}
    pairs = [
        [rows[f"{site.path}.peftc.prefix.{name}"].transpose(0, 1)[None] for name in ("P_k", "P_v")] for site in sites
    ]
    calls = iter((keys, values) for keys, both in pairs for values in both.chunk(2, -1))
    plain = torch.nn.functional.scaled_dot_product_attention

    def longer(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        k, v = (torch.cat([r.expand(*q.shape[:2], -1, -1), b], 2) for r, b in zip(next(calls), (k, v), strict=True))
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        return plain(q, k, v, torch.nn.functional.pad(attn_mask, (3, 0)), **{**options, "is_causal": False})

    model = CONFIGS["diffllama"][0](CONFIGS["diffllama"][1]).eval()
    model.load_state_dict({n: v for n, v in state.items() if n in model.state_dict()}, strict=True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", longer)
    with torch.no_grad():
        expected = model(**inputs).logits
    monkeypatch.undo()
    seen = inputs["attention_mask"].bool()
    for each in (program, spelled_out):
        found = answer(each, {**state, **rows}, inputs)
        assert (found - expected)[seen].abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_an_ffn_in_one_branch_with_its_attention_has_no_residual_of_its_own(name: str) -> None:
    sites = of_kind(name, "ffn")
    assert len(sites) == len(of_kind(name, "attention")) == (2 if name == "zamba" else 1)
    for site in sites:
        assert "residual" not in site.taps and "one branch with the attention" in site.missing["residual"]
        assert {"x", "gate", "up", "mid", "out"} == set(site.taps)


def test_every_matrix_of_a_state_space_model_is_a_linear_site() -> None:
    """Its fused kernel is given the weights of `x_proj`, `dt_proj` and `out_proj`, and calls none of these modules."""
    mixers = [f"backbone.layers.{layer}.mixer" for layer in range(2)]
    weights = {site.linears["out"].weight_name for site in of_kind("mamba", "linear")}
    parts = ("in_proj", "x_proj", "dt_proj", "out_proj")
    assert {f"{mixer}.{part}.weight" for mixer in mixers for part in parts} <= weights
    assert of_kind("mamba", "attention") == of_kind("mamba", "ffn") == []


def test_queries_and_keys_that_a_convolution_mixes_are_told_apart_by_their_width() -> None:
    for site in of_kind("zaya", "attention"):
        names = {role: linear.weight_name.split(".")[-2] for role, linear in site.linears.items()}
        assert names == {"q": "q_proj", "k": "k_proj", "o": "o_proj"}
        assert (site.dims["heads"], site.dims["kv_heads"], site.dims["head_dim"]) == (4, 2, 8)
        assert [site.taps[name].width for name in "qkv"] == [32, 16, 16]


def test_heads_are_told_from_a_length_that_is_a_number_by_the_rows_of_the_projection() -> None:
    subject = _subject(Record("diffusion_gemma"), lambda _: None)
    assert subject is not None
    sites = [site for site in subject.program.sites if site.kind == "attention"]
    written = [site for site in sites if ".decoder." in site.path]  # of one length: its canvas
    assert written and all(site.dims["kv_heads"] == 2 for site in sites)
    assert {site.taps["v"].layout for site in written} == {"flat", "bshd"}
