"""Initial values made of frozen weights: what `weight` is at every place, from a checkpoint and from a model alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peftc
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.lang.loader import parse_rule
from peftc.runtime.delta_dir import DeltaDir
from peftc.store.model_dir import ModelDir
from runtime.tiny import SMALL, TOKENS

HEAD = "peftc: 1\nname: start\nhyper: {r: 4, s: 2.0}\ndeltas:\n"


def rule_file(path: Path, row: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    file = path / "start.yaml"
    file.write_text(HEAD + f"  a: {row}\n", encoding="utf-8")
    return file


def starts(row: str, base: Path, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    """The delta tensors that `apply` writes, which must be those of `peftc.apply`."""
    file = rule_file(tmp_path / "rule", row)
    driver.apply(file, base, tmp_path / "out", **options)
    written = DeltaDir.open(tmp_path / "out").tensors()
    model = peftc.apply(file, base, **{"set" if k == "sets" else k: v for k, v in options.items()})
    for name, value in written.items():
        assert torch.equal(model.get_parameter(name), value), name
    return written


def copy_of(site: str, taps: str, where: str = "") -> str:
    """A row whose parameter W is a copy of the weight."""
    return (
        f"{{at: {site}, {where}modify: {taps}, form: 'linear(x, W) - linear(x, V)', "
        "params: {W: {shape: [d_out, d_in], init: weight}, V: {shape: [d_out, d_in], init: W, frozen: true}}}"
    )


def save(model: Any, path: Path, **options: Any) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(path, **options)
    return path


def test_weight_of_a_linear_is_its_weight_as_out_by_in(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    found = starts(copy_of("linear", "out", "where: {role: [o, up, down]}, "), model_dir("bert-base"), tmp_path)
    stored = ModelDir.open(model_dir("bert-base"))
    assert len(found) == 2 * 2 * 3
    for name, value in found.items():
        assert torch.equal(value, stored.read(name.partition(".peftc.")[0] + ".weight"))


def test_weight_of_a_conv1d_comes_transposed_and_its_q_k_v_are_rows_of_it(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    found = starts(copy_of("attention", "[q, k, v, out]"), model_dir("gpt2"), tmp_path)
    stored = ModelDir.open(model_dir("gpt2"))
    for layer in range(2):
        path = f"transformer.h.{layer}.attn"
        fused = stored.read(f"{path}.c_attn.weight")  # [in, q | k | v]
        for index, tap in enumerate("qkv"):
            assert torch.equal(found[f"{path}.peftc.a.{tap}.W"], fused[:, 32 * index : 32 * (index + 1)].T)
        assert torch.equal(found[f"{path}.peftc.a.out.W"], stored.read(f"{path}.c_proj.weight").T)


def test_rows_of_a_fused_projection_follow_its_layout(tmp_path: Path) -> None:
    """Phi-3 stacks q, k and v, with fewer keys than queries; GPT-NeoX interleaves them by head."""
    config = transformers.Phi3Config(num_key_value_heads=2, **SMALL, **TOKENS)
    base = save(transformers.Phi3ForCausalLM(config), tmp_path / "phi3")
    found = starts(copy_of("attention", "[q, k, v]"), base, tmp_path)
    fused = ModelDir.open(base).read("model.layers.1.self_attn.qkv_proj.weight")
    for tap, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        assert torch.equal(found[f"model.layers.1.self_attn.peftc.a.{tap}.W"], fused[rows])
    found = starts(copy_of("ffn", "[gate, up]"), base, tmp_path)
    fused = ModelDir.open(base).read("model.layers.0.mlp.gate_up_proj.weight")
    assert torch.equal(found["model.layers.0.mlp.peftc.a.gate.W"], fused[:64])
    assert torch.equal(found["model.layers.0.mlp.peftc.a.up.W"], fused[64:])


def test_rows_of_an_interleaved_projection_are_those_of_each_head(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(**SMALL, **TOKENS)
    base = save(transformers.GPTNeoXForCausalLM(config), tmp_path / "neox")
    found = starts(copy_of("attention", "[q, k, v]"), base, tmp_path)
    fused = ModelDir.open(base).read("gpt_neox.layers.0.attention.query_key_value.weight").reshape(4, 3, 8, 32)
    for index, tap in enumerate("qkv"):
        assert torch.equal(found[f"gpt_neox.layers.0.attention.peftc.a.{tap}.W"], fused[:, index].reshape(32, 32))


def test_weights_are_read_from_shards_and_through_ties(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SMALL, **TOKENS)
    base = save(transformers.LlamaForCausalLM(config), tmp_path / "llama", max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    row = "{at: linear, where: {path: lm_head}, modify: out, form: 'linear(x, W) - linear(x, V)', params: "
    row += "{W: {shape: [d_out, d_in], init: 's * weight'}, V: {shape: [d_out, d_in], init: W, frozen: true}}}"
    found = starts(row, base, tmp_path)
    assert torch.equal(found["lm_head.peftc.a.W"], 2 * ModelDir.open(base).read("model.embed_tokens.weight"))


def test_h_is_the_weight_or_bias_that_the_row_modifies(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    row = "{at: norm, modify: [weight, bias], form: v - w, params: {v: {shape: [d_out], init: h}, "
    found = starts(row + "w: {shape: [d_out], init: v, frozen: true}}}", model_dir("bert-base"), tmp_path)
    stored = ModelDir.open(model_dir("bert-base"))
    for tap in ("weight", "bias"):
        name = f"embeddings.LayerNorm.peftc.a.{tap}.v"
        assert torch.equal(found[name], stored.read(f"embeddings.LayerNorm.{tap}"))


def test_only_the_named_tensors_are_read(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = ModelDir.read

    def watched(self: ModelDir, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(ModelDir, "read", watched)
    driver.apply("pissa", model_dir("llama"), tmp_path / "out", sets={"r": "4"})
    stored = ModelDir.open(model_dir("llama"))
    linears = [name for name in stored.tensors if name.endswith("_proj.weight")]
    assert sorted(read) == sorted(linears), "each weight once, whatever is decomposed and copied"
    read.clear()
    driver.apply("lora", model_dir("llama"), tmp_path / "lora")
    assert read == []


def test_config_alone_is_planned_with_its_shapes_and_refused_by_apply(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((model_dir("llama") / "config.json").read_text())
    assert driver.plan("pissa", tmp_path).plan.parameters
    with pytest.raises(PeftcError) as caught:
        driver.apply("pissa", tmp_path, tmp_path / "out")
    assert caught.value.diagnostics[0].code == "E030"
    assert "starts from weights of the base" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("init", "code", "told"),
    [
        ("svd_u(weight, r)", "E013", "is [32, 4], and its shape is [4, 32]"),
        ("svd_vt(weight, 33)", "E013", "1 to 32 singular values"),
        ("svd_vt(weight[0], r)", "E013", "a matrix is needed"),
        ("weight @ weight[:3]", "E013", "does not fit"),
        ("topk(weight, 4096)", "E013", "1024 entries to choose from, not 4096"),
        ("sum(weight)", "E013", "is [32, 1]"),
        ("eye(40000)[:r, :d_in]", "E013", "the limit is 2 ** 30 entries"),
    ],
)
def test_a_start_of_another_shape_is_told_at_the_init(
    init: str, code: str, told: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    form = f"{{expr: 'linear(linear(x, A), B)', params: {{A: {{shape: [r, d_in], init: '{init}'}}, "
    row = "{at: attention, modify: q, form: " + form + "B: {shape: [d_out, r], init: zeros}}}}"
    with pytest.raises(PeftcError) as caught:
        driver.plan(rule_file(tmp_path, row), model_dir("bert-base"))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert told in diagnostic.render()
    assert diagnostic.span is not None
    assert init in diagnostic.span.text[diagnostic.span.col - 2 :]


def test_a_new_head_has_no_weight_to_start_from(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    file = rule_file(tmp_path, copy_of("linear", "out", "where: {path: classifier}, "))
    with pytest.raises(PeftcError, match=r"does not hold classifier\.weight, which the rule starts from"):
        driver.apply(file, model_dir("bert-base"), tmp_path / "out", head="sequence-classification", num_labels=2)


OPS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "svd": ("[d_out, d_in]", "svd_u(weight, d_in) @ diag(svd_s(weight, d_in)) @ svd_vt(weight, d_in)", lambda W: W),
    "singular values": ("[r]", "svd_s(weight, r)", lambda W: torch.linalg.svdvals(W)[:4]),
    "gram of u": ("[r, r]", "svd_u(weight, r).T @ svd_u(weight, r)", lambda W: torch.eye(4)),
    "qr": ("[d_out, d_in]", "qr_q(weight) @ qr_r(weight)", lambda W: W),
    "sort": ("[d_out, d_in]", "sort(weight)", lambda W: W.sort(-1).values),
    "sort of columns": ("[d_out, d_in]", "sort(weight, dim=0)", lambda W: W.sort(0).values),
    "topk": ("[r]", "topk(weight, r)", lambda W: W.flatten()[W.abs().flatten().topk(4).indices]),
    "mask": ("[d_out, d_in]", "topk_mask(weight, 50)", lambda W: (W.abs() >= W.abs().flatten().topk(50)[0][-1]) * 1.0),
    "rows": ("[r]", "topk_rows(weight, r)", lambda W: W.abs().flatten().topk(4).indices.div(32, rounding_mode="floor")),
    "columns": ("[r]", "topk_columns(weight, r)", lambda W: W.abs().flatten().topk(4).indices % 32),
    "a number": ("[r]", "s * r - 1 / s", lambda W: torch.full([4], 7.5)),
    "an op": ("[d_out]", "squeeze(amax(abs(weight)), -1)", lambda W: W.abs().amax(-1)),
    "identity": ("[r, r]", "eye(r)", lambda W: torch.eye(4)),
}


def test_ops_of_a_start_compute_what_torch_does(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    params = [f"T{i}: {{shape: {shape}, init: '{init}'}}" for i, (shape, init, _) in enumerate(OPS.values())]
    total = " + ".join(f"sum(flatten(T{i}))" for i in range(len(params)))
    row = f"{{at: attention, where: {{layers: [0]}}, modify: out, form: 'h * ({total})', params: "
    found = starts(f"{row}{{{', '.join(params)}}}}}", model_dir("bert-base"), tmp_path)
    W = ModelDir.open(model_dir("bert-base")).read("encoder.layer.0.attention.output.dense.weight")
    for index, (name, (_, _, expected)) in enumerate(OPS.items()):
        value = found[f"encoder.layer.0.attention.peftc.a.T{index}"]
        torch.testing.assert_close(value, expected(W).float(), atol=2e-6, rtol=1e-5, msg=name)


def test_signs_of_decompositions_are_fixed(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    row = "{at: attention, modify: out, form: 'linear(x, U) + linear(x, R)', params: "
    row += "{U: {shape: [d_out, d_in], init: 'svd_u(weight, d_in)'}, R: {shape: [d_out, d_in], init: qr_r(weight)}}}"
    for name, value in starts(row, model_dir("bert-base"), tmp_path).items():
        if name.endswith("U"):
            assert (value.gather(0, value.abs().argmax(0, keepdim=True)) > 0).all()
        else:
            assert (value.diagonal() >= 0).all()


def test_draws_inside_an_expression_follow_seed_and_name(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    row = "{at: block, modify: out, insert: sequential, form: 'linear(linear(x, A), B)', params: "
    row += "{A: {shape: [r, d_in], init: 'orthonormal(normal(1.0))'}, B: {shape: [d_out, r], init: 'zeros + 0'}}}"
    base = model_dir("bert-base")
    first = starts(row, base, tmp_path / "0")
    again = starts(row, base, tmp_path / "1")
    other = starts(row, base, tmp_path / "2", seed=1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name.endswith(".A"):
            torch.testing.assert_close(value @ value.T, torch.eye(4), atol=1e-5, rtol=0)
            assert not torch.equal(value, other[name])
    rows = [value for name, value in first.items() if name.endswith(".A")]
    assert not torch.equal(*rows), "layers have streams of their own"


def test_a_start_may_use_the_forms_let_names_that_read_only_what_is_frozen(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    row = "{at: linear, where: {role: q}, modify: weight, insert: sequential, compose: dh, form: {let: "
    row += "{c: 2 * r, Q: 'floor(h * c) / c'}, params: {A: {shape: [d_out, d_in], init: h - Q}}, expr: Q + A}}"
    base = model_dir("bert-base")
    for name, value in starts(row, base, tmp_path).items():
        W = ModelDir.open(base).read(name.partition(".peftc.")[0] + ".weight")
        torch.testing.assert_close(value, W - (W * 8).floor() / 8)
    wrong = HEAD + "  a: {at: ffn, modify: out, form: {let: {z: 'relu(x)'}, params: {A: {shape: [r], init: sum(z)}}, "
    with pytest.raises(PeftcError) as caught:
        parse_rule(wrong + "expr: z * A}}\n", "wrong.yaml")
    assert [d.message for d in caught.value.diagnostics] == ["`x` is not known when `A` starts"]


def test_a_start_in_half_precision_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(num_key_value_heads=2, **SMALL, **TOKENS)
    base = save(transformers.LlamaForCausalLM(config).to(torch.bfloat16), tmp_path / "llama")
    row = "{at: attention, modify: q, form: 'linear(linear(x, A), B)', params: {A: {shape: [r, d_in], "
    row += "init: 'svd_vt(weight, r)', dtype: bfloat16}, B: {shape: [d_out, r], init: zeros, dtype: bfloat16}}}"
    found = starts(row, base, tmp_path)["model.layers.0.self_attn.peftc.a.A"]
    W = ModelDir.open(base).read("model.layers.0.self_attn.q_proj.weight")
    u, _, vt = torch.linalg.svd(W.float())
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (vt * signs.T)[:4].bfloat16())


def test_a_start_that_is_not_finite_is_refused_at_its_init(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    row = "{at: linear, where: {role: q}, modify: weight, insert: sequential, form: A, params: "
    file = rule_file(tmp_path, row + "{A: {shape: [d_out, d_in], init: 'weight / (weight - weight)'}}}")
    with pytest.raises(PeftcError, match="holds NaN or infinity") as caught:
        driver.apply(file, model_dir("bert-base"), tmp_path / "out")
    assert caught.value.diagnostics[0].span is not None


def test_loading_a_delta_directory_reads_its_start_and_computes_none(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.apply("olora", model_dir("bert-base"), tmp_path / "out", sets={"r": "4"})
    monkeypatch.setattr("peftc.runtime.init.Initializer._compute", lambda *_: pytest.fail("a start was computed"))
    model = peftc.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "peftc.json").read_text())["counts"]["trained"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
