"""LoRA on stacked experts against torch and against HF `peft`, whose models run their experts in a plain loop.

Weights are stored as [experts, out, in], or as [experts, in, out] with gate and up interleaved and biases (GPT-OSS).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recording import record
from torch import Tensor

from methods.harness import Folded, difference, gradients, inputs, output, scramble
from peftc.fold.state import FoldedState
from peftc.frontend.trace import build_skeleton, default_inputs
from peftc.lang.loader import parse_rule
from peftc.passes.fold import Fold
from peftc.pipeline import analyse, rewrite
from peftc.runtime.graph_model import GraphModel, state_of

R, ALPHA = 2, 6.0
TOLERANCE = 1e-10
_SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32,
    "experts_implementation": "eager",
}  # fmt: skip


def _mixtral() -> Any:
    return transformers.MixtralConfig(**_SIZES, intermediate_size=24, num_local_experts=3)


def _gpt_oss() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return transformers.GptOssConfig(
        **_SIZES, intermediate_size=24, num_local_experts=3, head_dim=4, sliding_window=4, layer_types=kinds
    )


def _deepseek_v3() -> Any:
    sizes = {**_SIZES, "num_key_value_heads": 4}
    return transformers.DeepseekV3Config(
        **sizes, intermediate_size=40, moe_intermediate_size=24, n_routed_experts=3, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    )  # fmt: skip


def _qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(**_SIZES, moe_intermediate_size=24, num_experts=3, head_dim=4)


def _olmoe() -> Any:
    return transformers.OlmoeConfig(**_SIZES, intermediate_size=24, num_experts=3)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_oss": _gpt_oss, "mixtral": _mixtral, "deepseek_v3": _deepseek_v3, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe
}  # fmt: skip
FAST = ("gpt_oss", "mixtral")
NAMES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CONFIGS]


def tiny(name: str) -> Any:
    """In float64, weights large enough for every expert and bias to matter; its experts are run one after the other."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scale else 0.3 * noise)
    return model.eval()


def stacks(model: Any) -> dict[str, str]:
    """The stacked weights of every module that holds experts, by transformers' names, each with its tap."""
    taps = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
    holders = [path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    return {f"{path}.{n}": tap for path in holders for n, tap in taps.items() if hasattr(model.get_submodule(path), n)}


def is_transposed(model: Any, stack: str) -> bool:
    return model.get_submodule(stack.rpartition(".")[0]).is_transposed


class Subject:
    """A family's model, and the adapted one with deltas that are not zero."""

    def __init__(self, name: str, directory: Path) -> None:
        import peftc

        self.plain = tiny(name)
        self.stacks = stacks(self.plain)
        self.plain.save_pretrained(directory, save_original_format=False)
        self.ours = peftc.apply("experts_lora", directory, set={"r": R, "alpha": ALPHA})
        scramble((key, self.ours.get_parameter(key)) for key in self.ours.surgery.plan.parameters)

    def pair(self, stack: str) -> tuple[Tensor, Tensor]:
        """A [experts, r, in] and B [experts, out, r] of a stack."""
        owner = f"{stack.rpartition('.')[0]}.peftc.lora.{self.stacks[stack]}"
        return self.ours.get_parameter(f"{owner}.A"), self.ours.get_parameter(f"{owner}.B")


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            made[name] = Subject(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return subject


class Written:
    """The same in torch: a plain model whose stacks are W + s B A, expert by expert."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        pairs = {stack: subject.pair(stack) for stack in subject.stacks}
        self.leaves = {k: tuple(t.detach().clone().requires_grad_() for t in pair) for k, pair in pairs.items()}

    def eval(self) -> Written:
        return self

    lm_head = True

    def __call__(self, **given: Tensor) -> Any:
        plain, changed = self.subject.plain, {}
        for stack, (a, b) in self.leaves.items():
            deltas = [ALPHA / R * (b[e] @ a[e]) for e in range(len(a))]
            deltas = [delta.T for delta in deltas] if is_transposed(plain, stack) else deltas
            changed[stack] = plain.get_parameter(stack) + torch.stack(deltas)
        return torch.func.functional_call(plain, changed, kwargs=given)


@pytest.mark.parametrize("name", NAMES)
def test_every_stack_of_experts_is_a_tap_of_one_site(name: str, subject_of: Callable[[str], Subject]) -> None:
    """Against the module tree: its names, shapes and its own word for the order of a weight."""
    subject = subject_of(name)
    program = subject.ours.program_for(inputs())
    found = {
        program.parameter_name(tap.node): (tap.name, tap.layout == "transposed")
        for site in program.sites
        if site.kind == "experts"
        for tap in site.taps.values()
        if not tap.name.endswith("_bias")
    }
    expected = {stack: (tap, is_transposed(subject.plain, stack)) for stack, tap in subject.stacks.items()}
    assert found == expected and len(found) == (2 if name == "deepseek_v3" else 4)
    sites = [site for site in program.sites if site.kind == "experts"]
    assert {(s.dims["experts"], s.dims["d_model"], s.dims["d_ff"]) for s in sites} == {(3, 16, 24)}
    assert [site.layer for site in sites] == ([1] if name == "deepseek_v3" else [0, 1])
    biased = {"gate_up_bias", "down_bias"} if name == "gpt_oss" else set()
    assert all({tap for tap in site.taps if tap.endswith("_bias")} == biased for site in sites)


@pytest.mark.parametrize("name", NAMES)
def test_lora_on_experts_equals_torch_in_outputs_and_gradients(name: str, subject_of: Callable[[str], Subject]) -> None:
    subject = subject_of(name)
    written = Written(subject)
    outputs = difference(output(subject.ours), output(written))
    assert outputs <= TOLERANCE and difference(output(subject.plain), output(written)) > 1e-2
    mine = gradients(subject.ours, [t for stack in subject.stacks for t in subject.pair(stack)])
    theirs = gradients(written, [t for stack in subject.stacks for t in written.leaves[stack]])
    found = max(difference(a, b) for a, b in zip(mine, theirs, strict=True))
    assert found <= TOLERANCE and min(float(g.abs().max()) for g in mine) > 1e-8
    record("experts_lora", "torch", TOLERANCE, outputs=outputs, gradients=found)


@pytest.mark.parametrize("name", NAMES)
def test_lora_on_experts_equals_peft_and_its_merge(name: str, subject_of: Callable[[str], Subject]) -> None:
    peft = pytest.importorskip("peft")
    subject = subject_of(name)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=[*dict.fromkeys(s.split(".", 3)[3] for s in subject.stacks)],
    )
    theirs = peft.get_peft_model(copy.deepcopy(subject.plain), config).eval()
    factors = peft_factors(theirs)
    assert set(factors) == set(subject.stacks)
    with torch.no_grad():
        for stack, (a, b) in factors.items():
            ours = subject.pair(stack)
            a.copy_(ours[0].flatten(0, 1))
            b.copy_(ours[1].permute(1, 2, 0).flatten(1))
    outputs = difference(output(subject.ours), output(theirs))
    assert outputs <= TOLERANCE
    pairs = [subject.pair(stack) for stack in factors]
    mine = gradients(subject.ours, [t for pair in pairs for t in pair])
    other = gradients(theirs, [t for pair in factors.values() for t in pair])
    mine = [m.flatten(0, 1) if i % 2 == 0 else m.permute(1, 2, 0).flatten(1) for i, m in enumerate(mine)]
    found = max(difference(a, b) for a, b in zip(mine, other, strict=True))
    assert found <= TOLERANCE
    merged = theirs.merge_and_unload().state_dict()
    folded = folded_state(subject.ours)
    weights = max(difference(folded(stack), merged[stack]) for stack in subject.stacks)
    assert weights <= TOLERANCE
    record("experts_lora", f"peft {peft.__version__}", TOLERANCE, outputs=outputs, gradients=found, weights=weights)


def peft_factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each wrapped parameter, by the name that it has in the plain model."""
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            owner = path.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{owner}.{module.parameter_name}"] = (
                module.lora_A["default"].weight, module.lora_B["default"].weight,
            )  # fmt: skip
    return found


def folded_state(model: GraphModel) -> FoldedState:
    step = Fold()
    step.apply(model.program_for(inputs()))
    assert {decision.result for decision in step.decisions} == {"merged"}
    return FoldedState(lambda name: state_of(model)[name].detach(), step.updates)


@pytest.mark.parametrize("name", NAMES)
def test_folded_experts_answer_as_the_unfolded_model_does(name: str, subject_of: Callable[[str], Subject]) -> None:
    subject = subject_of(name)
    folded = Folded.of(subject.ours)
    assert (folded.results, set(folded.state.touched)) == ({"merged"}, set(subject.stacks))
    assert difference(output(folded.into(subject.plain)), output(subject.ours)) <= TOLERANCE


def test_experts_that_are_called_by_themselves_answer_the_same(subject_of: Callable[[str], Subject]) -> None:
    """A hook makes the graph run in parts: each mixture's weights are then made inside its own call."""
    subject = subject_of("mixtral")
    calls: list[str] = []
    pairs = [tensor for stack in subject.stacks for tensor in subject.pair(stack)]
    whole, before = output(subject.ours), gradients(subject.ours, pairs)
    experts = subject.ours.get_submodule("model.layers.1.mlp.experts")
    hook = experts.register_forward_hook(lambda *_: calls.append("experts"))
    try:
        assert torch.equal(output(subject.ours), whole) and calls == ["experts"]
        assert all(torch.equal(a, b) for a, b in zip(gradients(subject.ours, pairs), before, strict=True))
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_folded_experts_answer_in_onnxruntime_as_in_torch(name: str, tmp_path: Path) -> None:
    import peftc
    from peftc import driver

    tiny(name).float().save_pretrained(tmp_path / "base", save_original_format=True)
    ours = peftc.apply("experts_lora", tmp_path / "base", set={"r": R})
    scramble((key, ours.get_parameter(key)) for key in ours.surgery.plan.parameters)
    ours.save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"})
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert {decision["result"] for decision in certificate["decisions"]} == {"merged"}
    assert len(certificate["comparisons"]) >= 2 and all(entry["holds"] for entry in certificate["comparisons"])


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_found_however_the_model_runs_them(way: str) -> None:
    """A loop is traced as a grouped product, which computes the same; the model's own choice stays."""
    config = CONFIGS["gpt_oss"]()
    config._experts_implementation = way
    skeleton = build_skeleton(transformers.GptOssForCausalLM, config, torch.float32)
    sites = analyse(skeleton, default_inputs(skeleton.model)).sites
    assert skeleton.config._experts_implementation == way
    taps = {"gate_up": "transposed", "down": "transposed", "gate_up_bias": "flat", "down_bias": "flat"}
    found = [site for site in sites if site.kind == "experts"]
    assert [{name: tap.layout for name, tap in site.taps.items()} for site in found] == [taps, taps]
    assert [site.path for site in sites if site.kind == "ffn"] == ["model.layers.0.mlp", "model.layers.1.mlp"]


CHOSEN = """\
peftc: 1
name: chosen
hyper: {r: 4, ids: {default: [0, 2], min: 0}}
deltas:
  lora:
    at: experts
    modify: down
    insert: sequential
    params:
      A: {shape: [len(ids), r, d_in], init: kaiming_uniform}
      B: {shape: [len(ids), d_out, r], init: zeros}
    form: "place(B @ A, ids, experts)"
  rest:
    at: experts
    modify: down
    insert: sequential
    params:
      A: {shape: [1, 1, d_in], init: kaiming_uniform}
      B: {shape: [1, d_out, 1], init: zeros}
    form: "place(B @ A, [1], experts)"
"""


def test_chosen_experts_have_a_rank_of_their_own(subject_of: Callable[[str], Subject]) -> None:
    """Experts 0 and 2 with rank 4, expert 1 with rank 1: the stack moves by each one's own product."""
    subject = subject_of("mixtral")
    located = analyse(subject.ours.skeleton(), default_inputs(subject.ours.skeleton().model))
    plan = rewrite(located, parse_rule(CHOSEN, "chosen.yaml"))
    assert plan.trained_count == 2 * (2 * 4 + 1) * (24 + 16)
    generator = torch.Generator().manual_seed(5)
    deltas = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in plan.parameters.items()}
    state = {**state_of(subject.plain), **deltas}
    step = Fold()
    step.apply(located)
    assert {decision.result for decision in step.decisions} == {"merged"}
    folded = FoldedState(lambda name: state[name].detach(), step.updates)
    for layer in (0, 1):
        stack, own = f"model.layers.{layer}.mlp.experts.down_proj", f"model.layers.{layer}.mlp.experts.peftc"
        moved = folded(stack) - subject.plain.get_parameter(stack).detach()
        for expert, (row, place) in {0: ("lora", 0), 1: ("rest", 0), 2: ("lora", 1)}.items():
            product = deltas[f"{own}.{row}.B"][place] @ deltas[f"{own}.{row}.A"][place]
            assert difference(moved[expert], product) <= TOLERANCE
