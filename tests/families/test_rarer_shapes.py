"""Sites of families whose blocks are built otherwise than most: each on one tiny model, against the model by hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.ir.copying import copied
from peftc.ir.program import Program
from peftc.ir.sites import Site
from peftc.lang.loader import load_rule
from peftc.merging.certify import random_batches
from peftc.pipeline import analyse, rewrite
from peftc.runtime.executor import Executor
from peftc.survey import census
from peftc.survey.weights import random_state
from tests.families.test_shapes_of_blocks import beside
from tests.families.test_shapes_of_blocks import of_kind as shapes_of

TOLERANCE = 1e-5
TEXT: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTURE = {**TEXT, "num_experts_per_tok": 2}
CONFIGS: dict[str, tuple[Any, Any]] = {
    "flex_olmo": (  # a mixture reads the residual stream itself, and a norm follows it
        transformers.FlexOlmoModel, transformers.FlexOlmoConfig(**MIXTURE, num_experts=4),
    ),
    "cohere2_moe": (  # a mixture beside an attention, both of one norm
        transformers.Cohere2MoeModel,
        transformers.Cohere2MoeConfig(
            **MIXTURE, head_dim=8, num_experts=4, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
            mlp_layer_types=["sparse", "sparse"],
        ),
    ),
    "minimax": (  # the stream that a mixture's result joins is what it reads
        transformers.MiniMaxModel,
        transformers.MiniMaxConfig(**MIXTURE, num_local_experts=4, layer_types=["full_attention"] * 2),
    ),
    "muse_spark": (  # projections of a mixture's own before and behind its experts
        transformers.MuseSparkTextModel,
        transformers.MuseSparkTextConfig(
            **MIXTURE, head_dim=8, num_local_experts=4, moe_intermediate_size=8, moe_hidden_size=24, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"], layer_rope_theta=[1e4, 0],
            mlp_layer_types=["sparse", "sparse"],
        ),
    ),
    "bitnet": (  # a norm inside the FFN
        transformers.BitNetModel, transformers.BitNetConfig(**TEXT),
    ),
    "xglm": (  # masked scores are bounded from below
        transformers.XGLMModel,
        transformers.XGLMConfig(
            vocab_size=50, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64
        ),
    ),
    "swinv2": (  # scores of normed queries and keys, scaled for each head
        transformers.Swinv2Model,
        transformers.Swinv2Config(
            image_size=16, patch_size=2, num_channels=3, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
        ),
    ),
    "vitdet": (  # images keep two axes; heads are folded into the batch
        transformers.VitDetModel,
        transformers.VitDetConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, pretrain_image_size=64
        ),
    ),
    "timesformer": (  # as many frames as heads
        transformers.TimesformerModel,
        transformers.TimesformerConfig(
            image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=48,
        ),
    ),
    "sam": (  # windows: the projection is of rows and columns, its parts are of a line
        transformers.SamVisionModel,
        transformers.SamVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, window_size=2,
            global_attn_indexes=[1], output_channels=16, mlp_dim=64,
        ),
    ),
    "lilt": (  # two streams; the last layer's second one is read by nothing
        transformers.LiltModel,
        transformers.LiltConfig(
            vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            channel_shrink_ratio=2, max_position_embeddings=64,
        ),
    ),
}  # fmt: skip


def slow(*values: object) -> Any:
    """A case that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@lru_cache
def located(name: str) -> tuple[Program, dict[str, Tensor], dict[str, Tensor]]:
    """A family's program, random weights, and a batch."""
    cls, config = CONFIGS[name]
    skeleton = build_skeleton(cls, config, torch.float32)
    specs = default_inputs(skeleton.model)
    program = analyse(skeleton, specs)
    return program, random_state(skeleton, program), dict(random_batches(specs, 19)[1][1])


def of_kind(name: str, kind: str) -> list[Site]:
    return [site for site in located(name)[0].sites if site.kind == kind]


def answer(program: Program, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return Executor(program, training=False, device=torch.device("cpu")).flat(state, inputs)[0]


def by_hand(name: str, state: dict[str, Tensor]) -> Any:
    cls, config = CONFIGS[name]
    model = cls(config).eval()
    model.load_state_dict({n: v for n, v in state.items() if n in model.state_dict()}, strict=True)
    return model


def filled(program: Program, rule: str, hyper: dict[str, object]) -> dict[str, Tensor]:
    """The parameters of a rule that is written into the program, as noise."""
    plan = rewrite(program, load_rule(rule, hyper))
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, generator=generator) for n, p in sorted(plan.parameters.items())}


def agree(found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> bool:
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    return float((found - expected)[seen].abs().max()) <= TOLERANCE * float(expected[seen].abs().max())


@pytest.mark.parametrize("name", ["cohere2_moe", *map(slow, ("flex_olmo", "minimax", "muse_spark", "bitnet"))])
def test_an_adapter_beside_reads_the_module_input_and_changes_its_result(name: str) -> None:
    base, state, inputs = located(name)
    program = copied(base)
    delta = filled(program, "pa_ffn", {"r": 4})
    model = by_hand(name, state)
    for layer in (0, 1):
        own = {n.rpartition(".")[2]: v for n, v in delta.items() if n.startswith(f"layers.{layer}.mlp.peftc.")}
        model.get_submodule(f"layers.{layer}.mlp").register_forward_hook(beside(own))
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert agree(answer(program, {**state, **delta}, inputs), expected, inputs)
    assert not agree(answer(base, state, inputs), expected, inputs)


@pytest.mark.parametrize("name", ["vitdet", *map(slow, ("xglm", "swinv2", "timesformer"))])
def test_a_prefix_as_longer_keys_equals_the_gated_sum(name: str) -> None:
    base, state, inputs = located(name)
    answers = []
    for rule in ("prefix", "prefix_gated"):
        program = copied(base)
        answers.append(answer(program, {**state, **filled(program, rule, {"l": 3})}, inputs))
    assert agree(answers[0], answers[1], inputs)
    assert not agree(answers[0], answer(base, state, inputs), inputs)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("vitdet", ["encoder.layer.0.attention", "encoder.layer.1.attention"]),
        slow("timesformer", ["encoder.layer.0.temporal_attention.attention", "encoder.layer.0.attention.attention"]),
        slow("sam", ["vision_encoder.layers.0.attn", "vision_encoder.layers.1.attn"]),
    ],
    ids=["vitdet", "timesformer", "sam"],
)
def test_lora_on_a_fused_projection_of_an_image_changes_the_rows_of_q_and_v(name: str, paths: list[str]) -> None:
    base, state, inputs = located(name)
    program = copied(base)
    delta = filled(program, "lora", {"r": 2, "alpha": 4.0})
    changed = dict(state)
    for path in paths:
        site = path.removesuffix(".attention")
        own = {".".join(n.split(".")[-2:]): v for n, v in delta.items() if n.startswith(f"{site}.")}
        weight = changed[f"{path}.qkv.weight"].clone()
        weight[:32] += 2.0 * own["q.B"] @ own["q.A"]
        weight[64:] += 2.0 * own["v.B"] @ own["v.A"]
        changed[f"{path}.qkv.weight"] = weight
    with torch.no_grad():
        expected = by_hand(name, changed)(**inputs)[0]
    assert agree(answer(program, {**state, **delta}, inputs), expected, inputs)
    assert not agree(answer(base, state, inputs), expected, inputs)


def test_a_stream_that_nothing_reads_is_no_site() -> None:
    counts = {kind: [site.layer for site in of_kind("lilt", kind)] for kind in ("attention", "ffn")}
    assert counts == {"attention": [0, 0, 1], "ffn": [0, 0, 1]}
    program = copied(located("lilt")[0])
    rewrite(program, load_rule("mam", {"l": 3, "r": 4}))  # raises where no gradient reaches a delta


def test_class_names_tell_two_streams_and_the_model_s_own_name_apart() -> None:
    model = build_skeleton(*CONFIGS["lilt"], torch.float32).model
    found = census.take(model, located("lilt")[0])
    assert (len(found.attention), len(found.ffn)) == (3, 3)
    config = transformers.ConvBertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=50)
    kinds = census._kinds(build_skeleton(transformers.ConvBertModel, config, torch.float32).model)
    assert kinds == {"encoder.layer.0.attention.self": "attention", "encoder.layer.0.intermediate": "ffn"}


def test_the_layers_of_a_hybrid_without_attention_have_their_number() -> None:
    numbers = {site.path.split(".")[2]: site.layer for site in shapes_of("zamba", "linear") if "layers" in site.path}
    assert numbers == {"0": 0, "1": 1, "2": 2}
    assert [site.layer for site in shapes_of("zamba", "attention")] == [1, 2]
    assert [site.path for site in shapes_of("zamba", "block")] == [f"model.layers.{layer}" for layer in range(3)]
    assert {site.dims["layers"] for site in shapes_of("zamba", "ffn")} == {3}
