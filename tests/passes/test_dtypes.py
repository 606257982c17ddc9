"""What a delta computes in, on a bfloat16 base: one cast for each value it reads, one for the value it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import fx

from peftc.frontend.trace import Skeleton, build_skeleton, default_inputs
from peftc.ir.program import Insertion, Program
from peftc.lang.loader import parse_rule
from peftc.lang.rule import Rule
from peftc.pipeline import analyse, rewrite

aten = torch.ops.aten
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
LORA = "{at: attention, modify: q, form: low_rank, compose: h + s * dh}"
MIXED = (
    "{at: ffn, modify: out, form: 'linear(linear(x, A), B)', params: {A: {shape: [r, d_in], init: normal(0.02), "
    "dtype: DTYPE}, B: {shape: [d_out, r], init: zeros}}}"
)


def _skeleton(dtype: torch.dtype) -> Skeleton:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    return build_skeleton(transformers.BertModel, config, dtype)


@pytest.fixture(scope="module")
def half() -> Skeleton:
    return _skeleton(BF16)


def inserted(skeleton: Skeleton, rule: Rule) -> tuple[Program, Insertion]:
    program = analyse(skeleton, default_inputs(skeleton.model))
    rewrite(program, rule)
    return program, program.ledger[0]


def casts(entry: Insertion) -> list[tuple[torch.dtype, torch.dtype]]:
    """From and to."""
    found = [node for node in entry.nodes if node.target is aten.to.dtype]
    return [(_dtype(node.all_input_nodes[0]), _dtype(node)) for node in found]


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


@pytest.mark.parametrize(
    ("row", "taps"),
    [
        (LORA, 2),  # x and h
        ("{at: ffn, modify: out, form: bottleneck, compose: h + s * dh}", 2),
        ("{at: ffn, modify: out, form: bottleneck, insert: sequential}", 1),  # x is h
        ("{at: ffn, modify: out, form: bottleneck, params: {g: {shape: [1], init: ones}}, compose: h + g * dh}", 2),
        ("{at: linear, where: {role: q}, modify: weight, insert: sequential, form: low_rank_weight}", 1),
        ("{at: linear, where: {role: q}, modify: weight, insert: sequential, form: rotation, with: {b: 4}}", 1),
        ("{at: ffn, modify: out, form: 'linear(mid * sigmoid(h) @ W, V)', params: {W: {shape: [d_ff, r], init: zeros}, "
         "V: {shape: [d_out, r], init: zeros}}}", 2),
    ],
)  # fmt: skip
def test_each_tap_is_cast_once_and_the_new_value_once(
    half: Skeleton, rule: Callable[..., Rule], row: str, taps: int
) -> None:
    row = row.replace("mid * sigmoid(h) @ W", "mid @ W * mean(h)")
    _, entry = inserted(half, rule(row, "{r: 4, s: 2.0}"))
    assert casts(entry) == [(BF16, F32)] * taps + [(F32, BF16)]
    assert _dtype(entry.after) == BF16


def test_deltas_of_the_base_dtype_need_no_cast(half: Skeleton, rule: Callable[..., Rule]) -> None:
    params = "params: {A: {shape: [d_out, d_in], init: zeros, dtype: DTYPE}}"
    for dtype in ("bfloat16", "base"):
        row = f"{{at: ffn, modify: out, form: 'linear(x, A)', {params}}}".replace("DTYPE", dtype)
        program, entry = inserted(half, rule(row, "{}"))
        assert casts(entry) == []
        assert {p.dtype for p in program.delta_parameters.values()} == {BF16}


def test_narrow_parameters_compute_in_the_widest_dtype(half: Skeleton, rule: Callable[..., Rule]) -> None:
    program, entry = inserted(half, rule(MIXED.replace("DTYPE", "bfloat16")))
    assert [p.dtype for p in program.delta_parameters.values()][:2] == [BF16, F32]
    assert casts(entry) == [(BF16, F32)] * 3 + [(F32, BF16)]  # x, A, h and the new value
    _, entry = inserted(half, rule(MIXED.replace("DTYPE", "float64")))
    assert sorted(map(str, casts(entry))) == sorted(map(str, [(BF16, F64), (BF16, F64), (F32, F64), (F64, BF16)]))


def test_narrow_delta_does_not_round_a_wide_base(bert_skeleton: Skeleton, rule: Callable[..., Rule]) -> None:
    params = "params: {A: {shape: [d_out, d_in], init: zeros, dtype: bfloat16}}"
    _, entry = inserted(bert_skeleton, rule(f"{{at: ffn, modify: out, form: 'linear(x, A)', {params}}}", "{}"))
    assert casts(entry) == [(F32, BF16), (BF16, F32)]  # x, and dh


def test_rewrite_computes_in_the_widest_dtype_of_its_parameters_and_its_taps(
    half: Skeleton, bert_skeleton: Skeleton
) -> None:
    text = (
        "peftc: 1\nname: mine\nrewrite:\n  mine:\n    at: attention\n    params:\n"
        "      A: {shape: [2, d_in], init: zeros, dtype: bfloat16}\n      B: {shape: [d_out, 2], init: zeros}\n"
        "    set: {q: 'q + linear(linear(x, A), B)'}\n"
    )
    _, entry = inserted(half, parse_rule(text, "mine.yaml"))
    assert casts(entry) == [(BF16, F32)] * 3 + [(F32, BF16)]  # A, q, x and the new q
    narrow = text.replace("zeros}", "zeros, dtype: bfloat16}")
    _, entry = inserted(bert_skeleton, parse_rule(narrow, "mine.yaml"))
    assert casts(entry) == [(BF16, F32)] * 2  # A and B: a narrow parameter rounds no wide base


def test_deltas_of_a_float64_base_are_float64(rule: Callable[..., Rule]) -> None:
    program, entry = inserted(_skeleton(F64), rule(LORA, "{r: 4, s: 2.0}"))
    assert {p.dtype for p in program.delta_parameters.values()} == {F64}
    assert casts(entry) == []
