"""Library rules against HF `peft`: the same parameters give the same outputs, and merging the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from torch import Tensor

from methods.harness import (
    HEADS,
    KV_HEADS,
    WIDTH,
    Folded,
    Layers,
    Tensors,
    apply_rule,
    difference,
    gradients,
    layers,
    output,
    peft_model,
    scramble,
    set_deltas,
    tiny,
)

peft: Any = pytest.importorskip("peft")

WORST = 1e-5
QUERY_VALUE = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


@dataclass(frozen=True, slots=True)
class Case:
    """A rule and the peft configuration that says the same; `copy` maps peft's layers to the rule's parameters."""

    rule: str
    family: str
    config: Callable[[str], Any]
    copy: Callable[[Layers], Tensors]
    result: str = "merged"
    values: dict[str, object] = field(default_factory=dict)
    same_count: bool = True
    """Whether both train the same number of parameters."""
    same_gradient: bool = True


def at_linear(delta: str, parameters: Callable[[Any], Tensors]) -> Callable[[Layers], Tensors]:
    """For rules at linear layers: the parameters of each, under its own path."""
    return lambda found: {
        f"{path}.peftc.{delta}.{name}": value for path, m in found.items() for name, value in parameters(m).items()
    }


def at_attention(
    delta: str, parameters: Callable[[Any], Tensors], shared: Callable[[Any], Tensors] | None = None
) -> Callable[[Layers], Tensors]:
    """For rules at the taps q, k, v of attention; `shared` are the parameters of all layers."""

    def copy(found: Layers) -> Tensors:
        values: Tensors = {}
        for path, layer in found.items():
            owner, tap = _attention(path)
            values.update({f"{owner}.peftc.{delta}.{tap}.{name}": v for name, v in parameters(layer).items()})
            if shared is not None:
                values.update({f"peftc.{delta}.{tap}.{name}": value for name, value in shared(layer).items()})
        return values

    return copy


def _attention(path: str) -> tuple[str, str]:
    """The path of the attention, and the tap that its projection at `path` makes."""
    owner, _, name = path.rpartition(".")
    return owner.removesuffix(".self"), name[0]


def lora(layer: Any) -> Tensors:
    return {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}


def lora_bias(layer: Any) -> Tensors:
    return {**lora(layer), "b": layer.lora_B["default"].bias}


def dora(layer: Any) -> Tensors:
    m = layer.lora_magnitude_vector["default"].weight
    return {**lora(layer), "m": m - layer.base_layer.weight.norm(dim=1)}


def vera(layer: Any) -> Tensors:
    return {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}


def vera_shared(layer: Any) -> Tensors:
    return {
        "A": layer.vera_A["default"][:, : layer.in_features],
        "B": layer.vera_B["default"][: layer.out_features],
    }


def loha(layer: Any) -> Tensors:
    names = {"A_1": "hada_w1_a", "B_1": "hada_w1_b", "A_2": "hada_w2_a", "B_2": "hada_w2_b"}
    return {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}


def lokr(layer: Any) -> Tensors:
    names = {"W_1": "lokr_w1", "A": "lokr_w2_a", "B": "lokr_w2_b"}
    return {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}


def hira(layer: Any) -> Tensors:
    return {"A": layer.hira_A["default"], "B": layer.hira_B["default"]}


def oft(layer: Any) -> Tensors:
    return {"v": layer.oft_R["default"].weight}


def boft(layer: Any) -> Tensors:
    """peft's matrices are skewed as (R - Rᵀ) / 2; the rule has the entries above the diagonal alone."""
    R = layer.boft_R["default"]
    above = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    skewed = 0.5 * (R - R.transpose(-1, -2))
    return {"v": skewed[..., above[0], above[1]], "g": layer.boft_s["default"].squeeze(-1)}


def hra(layer: Any) -> Tensors:
    """The frozen start is what peft starts from; here it is nothing, and V holds all."""
    u = layer.hra_u["default"].T
    return {"U_0": torch.zeros(u.shape[0] // 2, u.shape[1]), "V": u}


def adalora(layer: Any) -> Tensors:
    names = {"Q": "lora_A", "E": "lora_E", "P": "lora_B"}
    found = {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}
    return {**found, "E": found["E"].flatten(), "mask": torch.ones(found["E"].shape[0])}


def miss(layer: Any) -> Tensors:
    return {"D": layer.miss_block["default"]}


def c3a(layer: Any) -> Tensors:
    return {"w": layer.c3a_kernel["default"]}


def _places(layer: Any, rows: Tensor, columns: Tensor) -> Tensors:
    """Places as fractions of the sizes of the weight."""
    return {"rows": (rows + 0.5) / layer.out_features, "columns": (columns + 0.5) / layer.in_features}


def fourierft(layer: Any) -> Tensors:
    return {"v": layer.fourierft_spectrum["default"], **_places(layer, *layer.indices["default"])}


def shira(layer: Any) -> Tensors:
    return {"v": layer.shira_weight["default"], **_places(layer, *layer.shira_indices["default"])}


def road(layer: Any) -> Tensors:
    size = layer.out_features // layer.group_size["default"]
    shape = (size, 1, layer.group_size["default"] // 2)
    return {
        "t": layer.road_theta["default"].reshape(shape),
        "a": layer.road_alpha["default"].reshape(shape),
    }


def randlora(layer: Any) -> Tensors:
    return {"L": layer.randlora_lambda["default"].T, "G": layer.randlora_gamma["default"]}


def randlora_shared(layer: Any) -> Tensors:
    """peft pairs the rank-1 terms of A, rank first, with those of B, basis first: the same terms in another order."""
    narrow, wide = sorted((layer.in_features, layer.out_features))
    bases, rank = layer.num_bases, layer.r["default"]
    columns = layer.randlora_B["default"][:wide, :bases].flatten(1)
    A = layer.randlora_A["default"][:, 0, :narrow]
    return {"A": A, "B": columns.reshape(wide, rank, bases).transpose(1, 2)}


def ia3(found: Layers) -> Tensors:
    values: Tensors = {}
    for path, layer in found.items():
        l = layer.ia3_l["default"].flatten()  # noqa: E741
        if layer.is_feedforward:
            owner = path.removesuffix(".output.dense").removesuffix(".down_proj")
            values[f"{owner}.peftc.ffn.l"] = l
        else:
            owner, tap = _attention(path)
            values[f"{owner}.peftc.kv.{tap}.l"] = l
    return values


def ln_tuning(found: Layers) -> Tensors:
    values: Tensors = {}
    for path, layer in found.items():
        for name, tuned in layer.ln_tuning_layers["default"].named_parameters():
            values[f"{path}.peftc.{name}.v"] = tuned - getattr(layer.base_layer, name)
    return values


def llama_adapter(found: Layers) -> Tensors:
    """peft's keys and values are the frozen projections of the prompt; the rule trains them as they are."""
    values: Tensors = {}
    for path, layer in found.items():
        for name, projection in (("P_k", layer.model.k_proj), ("P_v", layer.model.v_proj)):
            rows = projection(layer.adaption_prompt[0])
            values[f"{path}.peftc.prompt.{name}"] = rows.unflatten(-1, (KV_HEADS, WIDTH // HEADS))
        values[f"{path}.peftc.prompt.g"] = layer.adaption_gate.expand(HEADS).reshape(HEADS, 1, 1)
    return values


def _boft_config(family: str) -> Any:
    """peft leaves the butterfly out where its CUDA kernel, a batch of block diagonals, is not there: here it is."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*one) for one in blocks])

    layer.get_fbd_cuda = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
    layer.FastBlockDiag = BlockDiagonal  # pyright: ignore[reportAttributeAccessIssue]
    return peft.BOFTConfig(target_modules=QUERY_VALUE[family], boft_block_size=4, boft_n_butterfly_factor=3)


def _ia3_config(family: str) -> Any:
    bert = (r".*\.(key|value)|.*layer\.\d\.output\.dense", r".*layer\.\d\.output\.dense")
    targets, inner = bert if family == "bert" else (["k_proj", "v_proj", "down_proj"], ["down_proj"])
    return peft.IA3Config(target_modules=targets, feedforward_modules=inner)


def trainable_tokens(found: Layers) -> Tensors:
    """peft trains the rows themselves; here what is added to them."""
    values: Tensors = {}
    for path, layer in found.items():
        rows = layer.trainable_tokens_delta["default"]
        values[f"{path}.peftc.tokens.v"] = rows - layer.base_layer.weight[layer.token_indices["default"]]
    return values


def _norms(family: str) -> Any:
    names = ["LayerNorm"] if family == "bert" else ["input_layernorm", "post_attention_layernorm", "norm"]
    return peft.LNTuningConfig(target_modules=names)


ALL_LINEAR = {
    "bert": r"encoder\.layer\..*(query|key|value|dense)",
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def _on_query_value(name: str, **options: Any) -> Callable[[str], Any]:
    return lambda family: getattr(peft, name)(target_modules=QUERY_VALUE[family], **options)


CASES = {
    "lora": Case("lora", "llama", _on_query_value("LoraConfig", r=4, lora_alpha=6), at_attention("lora", lora),
                 values={"r": 4, "alpha": 6.0}),
    "rslora": Case("rslora", "bert", _on_query_value("LoraConfig", r=4, lora_alpha=6, use_rslora=True),
                   at_attention("lora", lora), values={"r": 4, "alpha": 6.0}),
    "loraplus": Case("loraplus", "bert", _on_query_value("LoraConfig", r=4, lora_alpha=6), at_attention("lora", lora),
                     values={"r": 4, "alpha": 6.0}),
    "lora_linear": Case(
        "lora_linear", "bert",
        lambda f: peft.LoraConfig(target_modules=ALL_LINEAR[f], r=4, lora_alpha=6, lora_bias=True, lora_dropout=0.1),
        at_linear("lora", lora_bias), values={"r": 4, "alpha": 6.0, "bias": True, "p": 0.1}),
    "dora": Case("dora", "llama", _on_query_value("LoraConfig", r=4, lora_alpha=6, use_dora=True),
                 at_linear("dora", dora), values={"r": 4, "alpha": 6.0}),
    "dora on BERT": Case("dora", "bert", _on_query_value("LoraConfig", r=4, lora_alpha=6, use_dora=True),
                         at_linear("dora", dora), values={"r": 4, "alpha": 6.0}),
    "ia3": Case("ia3", "llama", _ia3_config, ia3),
    "ia3 on BERT": Case("ia3", "bert", _ia3_config, ia3),
    "ln_tuning": Case("ln_tuning", "bert", _norms, ln_tuning),
    "norm_tuning": Case("norm_tuning", "llama", _norms, ln_tuning),
    "vera": Case("vera", "llama", _on_query_value("VeraConfig", r=4), at_attention("vera", vera, vera_shared),
                 values={"r": 4}),
    "loha": Case("loha", "llama", _on_query_value("LoHaConfig", r=4, alpha=6), at_linear("loha", loha),
                 values={"r": 4, "alpha": 6.0}),
    "lokr": Case("lokr", "llama", _on_query_value("LoKrConfig", r=3, alpha=6, decompose_factor=4),
                 at_linear("lokr", lokr), values={"r": 3, "alpha": 6.0, "k": 4}),
    "hira": Case("hira", "bert", _on_query_value("HiraConfig", r=4), at_linear("hira", hira), values={"r": 4}),
    "oft": Case("oft", "llama", _on_query_value("OFTConfig", r=0, oft_block_size=8, use_cayley_neumann=False),
                at_linear("oft", oft), values={"b": 8}),
    "boft": Case("boft", "llama", _boft_config, at_linear("boft", boft), values={"b": 4, "m": 3}, same_count=False),
    "hra": Case("hra", "bert", _on_query_value("HRAConfig", r=4), at_linear("hra", hra), values={"r": 4}),
    "adalora": Case("adalora", "llama",
                    lambda f: peft.AdaLoraConfig(target_modules=ALL_LINEAR[f], init_r=4, lora_alpha=6, total_step=10),
                    at_linear("svd", adalora), values={"r": 4, "alpha": 6 * 4 / (4 + 1e-5)}),  # as peft divides
    "miss": Case("miss", "llama", _on_query_value("MissConfig", r=8), at_linear("miss", miss), values={"r": 8}),
    "c3a": Case("c3a", "llama", _on_query_value("C3AConfig", block_size=8), at_linear("c3a", c3a), values={"b": 8},
                same_gradient=False),  # peft's own backward of the convolution gives x the gradient in reverse order
    "fourierft": Case("fourierft", "llama", _on_query_value("FourierFTConfig", n_frequency=20, scaling=30.0),
                      at_linear("fourier", fourierft), values={"n": 20, "s": 30.0}),
    "shira": Case("shira", "llama", _on_query_value("ShiraConfig", r=2), at_linear("shira", shira), values={"r": 2}),
    "road": Case("road", "llama", _on_query_value("RoadConfig", group_size=8), at_linear("road", road),
                 values={"g": 8}),
    "randlora": Case("randlora", "llama", _on_query_value("RandLoraConfig", r=6, randlora_alpha=12),
                     at_attention("randlora", randlora, randlora_shared), values={"r": 6, "alpha": 12.0}),
    "trainable_tokens": Case(
        "trainable_tokens", "llama",
        lambda f: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[40, 11, 12, 3]),
        trainable_tokens, values={"ids": [40, 11, 12, 3]}),
    "trainable_tokens on BERT": Case(
        "trainable_tokens", "bert",
        lambda f: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[40, 11, 12, 3]),
        trainable_tokens, values={"ids": [40, 11, 12, 3]}),
    "llama_adapter": Case(
        "llama_adapter", "llama", lambda f: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2),
        llama_adapter, result="kept", values={"l": 5}, same_count=False),
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(made[family])
        return made[family]

    return base


def _adapted_layers(theirs: Any) -> Layers:
    from peft.tuners.adaption_prompt.layer import AdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    return layers(theirs, (BaseTunerLayer, AdaptedAttention))


def _gradient_difference(ours: Any, values: Tensors, theirs: Any, trained: list[Tensor]) -> float:
    """The largest, over peft's parameters: the rule's gradients taken to them through the copy, and peft's own."""
    names = [name for name, value in values.items() if value.requires_grad]
    own = gradients(ours, [ours.get_parameter(name) for name in names])
    copied = torch.autograd.grad([values[name] for name in names], trained, own)
    return max(difference(a, b) for a, b in zip(copied, gradients(theirs, trained), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_rule_computes_and_merges_what_peft_does(name: str, bases: Callable[[str], Path]) -> None:
    case = CASES[name]
    theirs = peft_model(case.family, case.config(case.family))
    trained = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad]
    scramble(trained)
    ours = apply_rule(case.rule, bases(case.family), case.values)
    plain = output(tiny(case.family))
    assert difference(output(ours), plain) <= WORST, "the rule does not start as the identity"
    values = case.copy(_adapted_layers(theirs))
    set_deltas(ours, {n: value.detach().clone() for n, value in values.items()})
    assert not case.same_count or ours.surgery.plan.trained_count == sum(p.numel() for _, p in trained)
    expected = output(theirs)
    assert difference(expected, plain) > 1e-2, "the method changes nothing here, so equality would prove nothing"
    apart = difference(output(ours), expected)
    slope = _gradient_difference(ours, values, theirs, [p for _, p in trained])
    folded = Folded.of(ours)
    assert folded.results == {case.result}
    weights = 0.0
    if case.result == "merged":
        merged = theirs.merge_and_unload()
        weights = max(difference(folded.state(key), value) for key, value in merged.state_dict().items())
        # Merged to merged: peft's own two outputs, unmerged and merged, may differ by more than this in float32.
        assert difference(output(folded.into(tiny(case.family))), output(merged)) <= WORST
    kept = {"weights": weights} if case.result == "merged" else {}
    kept |= {"gradients": slope} if case.same_gradient else {}
    config = type(theirs.peft_config["default"]).__name__
    record(case.rule, f"peft {peft.__version__} {config}", WORST, outputs=apart, **kept)
    assert apart <= WORST
    assert weights <= WORST
    assert slope <= WORST or not case.same_gradient
