"""`from:` reads taps of other sites: held to hooks on the base, and refused at the token where it means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.harness import Folded, apply_rule, difference, gradients, output, scramble, tiny
from torch import Tensor

from peftc.checking.check import check
from peftc.diagnostics import Diagnostic

WORST = 1e-5
ROWS = """
  skip: {at: block, modify: out, from: "block[layer - 1].out", form: low_rank, where: {if: layer > 0}}
  both:
    at: ffn
    modify: out
    from: {att: attention.out, e: model.embeddings}
    params: {g: {shape: [d_out], init: zeros}, W: {shape: [d_out, d_out], init: zeros}}
    form: "g * att + linear(e, W)"
"""


def text(rows: str, hyper: str = "{r: 4}") -> str:
    return f"peftc: 1\nname: mine\nhyper: {hyper}\ndeltas:\n{rows}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    tiny("bert").save_pretrained(directory)
    return directory


def told(rows: str, base: Path, tmp_path: Path) -> list[Diagnostic]:
    file = tmp_path / "t.yaml"
    file.write_text(text(rows), encoding="utf-8")
    (checked,) = check([str(file)], model=base).files
    return [d for d in checked.diagnostics if d.severity == "error"]


def reference(deltas: dict[str, Tensor]) -> Any:
    """The BERT with the two rows of ROWS, by hooks."""
    model: Any = tiny("bert")
    seen: dict[str, Tensor] = {}
    model.embeddings.word_embeddings.register_forward_hook(lambda _, given, e: seen.update(e=e))
    for index, layer in enumerate(model.encoder.layer):

        def keep(_: Any, given: Any, att: Tensor) -> None:
            seen["att"] = att

        def ffn(_: Any, given: Any, h: Tensor, path: str = f"encoder.layer.{index}") -> Tensor:
            g, W = (deltas[f"{path}.peftc.both.{name}"] for name in ("g", "W"))
            return h + g * seen["att"] + seen["e"] @ W.T

        def block(_: Any, given: Any, result: Any, path: str = f"encoder.layer.{index}", i: int = index) -> Any:
            h = result[0] if isinstance(result, tuple) else result
            if i > 0:
                A, B = (deltas[f"{path}.peftc.skip.{name}"] for name in ("A", "B"))
                h = h + seen["block"] @ A.T @ B.T
            seen["block"] = h
            return (h, *result[1:]) if isinstance(result, tuple) else h

        layer.attention.output.dense.register_forward_hook(keep)
        layer.output.dense.register_forward_hook(ffn)
        layer.register_forward_hook(block)
    return model


def test_values_of_other_sites_enter_with_their_gradients(bert: Path) -> None:
    ours = apply_rule(text(ROWS), bert, {})
    assert difference(output(ours), output(tiny("bert"))) <= WORST
    names = list(ours.surgery.plan.parameters)
    scramble((name, ours.get_parameter(name)) for name in names)
    deltas = {name: ours.get_parameter(name).detach().clone().requires_grad_() for name in names}
    theirs = reference(deltas)
    assert difference(output(theirs), output(tiny("bert"))) > 1e-2
    assert difference(output(ours), output(theirs)) <= WORST
    own = gradients(ours, [ours.get_parameter(name) for name in names])
    other = gradients(theirs, list(deltas.values()))
    assert max(float(g.abs().max()) for g in other) > 1e-3
    assert max(difference(a, b) for a, b in zip(own, other, strict=True)) <= WORST


def test_a_decoder_reads_what_leaves_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    base: Any = transformers.BartModel(config).eval()
    base.save_pretrained(tmp_path)
    row = '  a: {at: block, modify: out, where: {stack: decoder}, from: {m: "encoder.block[-1].out"}, '
    row += 'form: "g * mean(m, dim=1)", params: {g: {shape: [d_out], init: ones}}}\n'
    ours = apply_rule(text(row, "{}"), tmp_path, {}).eval()
    memory: list[Tensor] = []
    base.encoder.register_forward_hook(lambda _, given, result: memory.append(result[0]))
    for layer in base.decoder.layers:

        def edit(_: Any, given: Any, result: Any) -> Any:
            h = result[0] if isinstance(result, tuple) else result
            h = h + memory[-1].mean(1, keepdim=True)
            return (h, *result[1:]) if isinstance(result, tuple) else h

        layer.register_forward_hook(edit)
    ids = torch.randint(3, 64, (2, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    with torch.no_grad():
        assert difference(ours(**given)[0], base(**given, use_cache=False)[0]) <= WORST


def test_a_reference_to_the_layers_own_input_folds_as_parallel_does(bert: Path) -> None:
    ours = apply_rule(text("  a: {at: attention, modify: q, from: attention.x, form: low_rank}\n"), bert, {})
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    folded = Folded.of(ours)
    assert folded.results == {"merged"}
    assert difference(output(folded.into(tiny("bert"))), output(ours)) <= WORST


def test_what_is_no_input_of_the_layer_is_kept_with_that_reason(bert: Path) -> None:
    ours = apply_rule(text("  a: {at: ffn, modify: out, from: attention.x, form: low_rank}\n"), bert, {})
    folded = Folded.of(ours)
    assert folded.results == {"kept"}
    assert folded.reasons == {"its input is not that of `dense`, so it is no change of that weight"}


LATE = "is computed from `out` of block encoder.layer.0, which it would change"
WRONG: dict[str, tuple[str, str, str, str]] = {
    "late": ('{at: block, modify: out, from: "block[1].out", form: low_rank, where: {layers: [0]}}',
             "E024", "block[1].out", LATE),
    "late for a weight": ('{at: linear, modify: weight, from: {z: "block[-1].out"}, where: {role: q},'
                          ' form: "mean(mean(z, dim=1), dim=0) * mean(h)"}',
                          "E024", "block[-1].out", "is computed from `weight` of linear"),
    "no layer before the first": ('{at: block, modify: out, from: "block[layer - 1].out", form: low_rank}',
                                  "E026", "block[layer - 1].out", "is layer -1 of the encoder"),
    "beyond the last layer": ('{at: block, modify: out, from: "block[7].out", form: low_rank}',
                              "E026", "block[7].out", "is layer 7 of the encoder"),
    "several sites": ("{at: ffn, modify: out, from: linear.out, form: low_rank}", "E026", "linear.out",
                      "is one of 6 sites: encoder.layer.0.attention.self.query"),
    "no such kind": ('{at: ffn, modify: out, from: "conv[0].out", form: low_rank}', "E026", "conv[0].out",
                     "names a kind of site that this model has not"),
    "no such stack": ('{at: ffn, modify: out, from: "decoder.block[0].out", form: low_rank}', "E026",
                      "decoder.block[0].out", "names the decoder, where this model has no block"),
    "no such tap here": ("{at: block, modify: out, from: ffn.gate, form: low_rank}", "E004", "ffn.gate", "gate"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_reference_that_means_nothing_is_told_at_its_token(case: str, bert: Path, tmp_path: Path) -> None:
    row, code, token, message = WRONG[case]
    (found,) = told(f"  a: {row}\n", bert, tmp_path)
    assert found.code == code
    assert message in found.message
    assert found.span is not None
    assert found.span.text[found.span.col - 1 : found.span.end_col - 1] == token


def test_a_prefix_may_not_read_what_comes_after_its_attention(bert: Path, tmp_path: Path) -> None:
    form = '{attend: {keys: "P_k + mean(mean(mean(z)))", values: P_v}, '
    shape = "{shape: [r, kv_heads, head_dim], init: zeros}"
    form += f"params: {{P_k: {shape}, P_v: {shape}}}}}"
    row = f'  a: {{at: attention, modify: heads, compose: gate, from: {{z: "block[-1].out"}}, form: {form}}}\n'
    (found,) = told(row, bert, tmp_path)
    assert (found.code, found.span.text[found.span.col - 1 : found.span.end_col - 1] if found.span else "") == (
        "E024", "block[-1].out",
    )  # fmt: skip
