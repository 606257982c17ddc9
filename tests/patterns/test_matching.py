"""What a pattern matches and what not, each claim on a graph of a few ops."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from patterns.graphs import Writer
from peftc.ir.sites import Site
from peftc.patterns.graph import GraphIndex
from peftc.patterns.judge import Judge
from peftc.patterns.match import MAX_STEPS, Matcher
from peftc.patterns.reading import parse_pattern
from peftc.patterns.sites import Found, find
from peftc.patterns.terms import Pattern

aten = torch.ops.aten


def pattern(lines: str | Sequence[str], **keys: str) -> Pattern:
    lines = [lines] if isinstance(lines, str) else lines
    body = "".join(f"  - {line}\n" for line in lines)
    rest = "".join(f"{key}: {value}\n" for key, value in keys.items())
    return parse_pattern(f"peftc-pattern: 1\nname: mine\nmatch:\n{body}{rest}", "mine.yaml")


def found(w: Writer, result: fx.Node, lines: str | Sequence[str], **keys: str) -> Found:
    return find(w.program(result), [pattern(lines, **keys)])


def sites(w: Writer, result: fx.Node, lines: str | Sequence[str], **keys: str) -> list[Site]:
    return found(w, result, lines, **keys).sites


def start() -> tuple[Writer, fx.Node]:
    w = Writer()
    return w, w.placeholder("input", "x", 2, 8, 4)


GATED = ("g = linear(x, W_g)", "u = linear(x, W_u)", "out = silu(g) * u")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_product_matches_in_either_order(swapped: bool) -> None:
    w, x = start()
    gate, up = w.linear(x, "gate", 6, 4), w.linear(x, "up", 6, 4)
    operands = (w.call(aten.silu.default, gate), up)
    (site,) = sites(w, w.call(aten.mul.Tensor, *(operands[::-1] if swapped else operands)), GATED)
    assert (site.taps["g"].node, site.taps["u"].node, site.taps["x"].node) == (gate, up, x)
    assert [linear.weight_name for linear in site.linears.values()] == ["gate.weight", "up.weight"] or not swapped
    assert {role: linear.weight_name for role, linear in site.linears.items()} == {"g": "gate.weight", "u": "up.weight"}


def test_one_name_is_one_value_up_to_casts_and_dropout() -> None:
    w, x = start()
    same = w.call(aten.dropout.default, w.call(aten.to.dtype, x, torch.float32), 0.1, True)
    good = w.call(aten.mul.Tensor, w.call(aten.silu.default, w.linear(x, "a", 6, 4)), w.linear(same, "b", 6, 4))
    assert len(sites(w, good, GATED)) == 1
    w, x = start()
    other = w.call(aten.tanh.default, x)
    bad = w.call(aten.mul.Tensor, w.call(aten.silu.default, w.linear(x, "a", 6, 4)), w.linear(other, "b", 6, 4))
    assert sites(w, bad, GATED) == []


def test_two_values_of_a_pattern_are_two_nodes() -> None:
    w, x = start()
    one = w.linear(x, "a", 6, 4)
    assert sites(w, w.call(aten.mul.Tensor, w.call(aten.silu.default, one), one), GATED) == []


@pytest.mark.parametrize(
    ("bias", "line", "matches", "taps"),
    [
        (False, "out = linear(x, W)", True, {"x", "W", "out"}),
        (True, "out = linear(x, W)", False, set()),
        (False, "out = linear(x, W, b?)", True, {"x", "W", "out"}),
        (True, "out = linear(x, W, b?)", True, {"x", "W", "b", "out"}),
        (False, "out = linear(x, W, b)", False, set()),
        (True, "out = linear(x, W, b)", True, {"x", "W", "b", "out"}),
        (True, "out = linear(_, _, _)", True, {"out"}),
    ],
)
def test_an_operand_is_there_unless_it_is_optional(bias: bool, line: str, matches: bool, taps: set[str]) -> None:
    w, x = start()
    found = sites(w, w.linear(x, "a", 6, 4, bias=bias), line)
    assert len(found) == matches
    assert all(set(site.taps) == taps for site in found)
    assert all(site.missing == ({"b": "`b` is absent here"} if "?" in line and not bias else {}) for site in found)


def test_a_capital_is_a_parameter_and_a_weight_tap_with_its_layout() -> None:
    w, x = start()
    weight = w.parameter("conv1d.weight", 4, 6)  # stored [in, out], as GPT-2 does
    turned = w.call(aten.transpose.int, weight, 0, 1)
    out = w.call(aten.linear.default, x, turned)
    (site,) = sites(w, out, "out = linear(x, W)", shapes="{W: [d_out_, d_in_]}")
    tap = site.taps["W"]
    assert (tap.node, tap.layout, tap.user, tap.canonical_shape) == (weight, "transposed", turned, (6, 4))
    assert (site.dims["d_out_"], site.dims["d_in_"]) == (6, 4)
    w, x = start()
    computed = w.call(aten.tanh.default, w.parameter("w", 6, 4))
    assert sites(w, w.call(aten.linear.default, x, computed), "out = linear(x, W)") == []


@pytest.mark.parametrize(
    ("step", "lines", "matches"),
    [
        (lambda w, n: w.call(aten.dropout.default, n, 0.1, True), "out = relu(tanh(x))", True),
        (lambda w, n: w.call(aten.to.dtype, n, torch.float64), "out = relu(tanh(x))", True),
        (lambda w, n: w.call(aten.view.default, n, [16, 4]), "out = relu(tanh(x))", True),
        (lambda w, n: w.call(aten.transpose.int, n, 0, 1), "out = relu(tanh(x))", True),
        (lambda w, n: w.call(aten.slice.Tensor, n, 1, 0, 2**63 - 1), "out = relu(tanh(x))", True),
        (lambda w, n: w.call(aten.view.default, n, [2, 32]), "out = relu(tanh(x))", False),
        (lambda w, n: w.call(aten.transpose.int, n, 1, 2), "out = relu(tanh(x))", False),
        (lambda w, n: w.call(aten.slice.Tensor, n, 1, 0, 2), "out = relu(tanh(x))", False),
        (lambda w, n: w.call(aten.neg.default, n), "out = relu(tanh(x))", False),
        (lambda w, n: w.call(aten.transpose.int, n, 1, 2), "out = relu(transpose(tanh(x)))", True),
        (lambda w, n: w.call(aten.dropout.default, n, 0.1, True), "out = relu(dropout(tanh(x)))", True),
        (lambda w, n: n, "out = relu(dropout(tanh(x)))", False),
    ],
)
def test_what_keeps_the_last_axis_is_stepped_over(
    step: Callable[[Writer, fx.Node], fx.Node], lines: str, matches: bool
) -> None:
    w, x = start()
    out = w.call(aten.relu.default, step(w, w.call(aten.tanh.default, x)))
    assert len(sites(w, out, lines)) == matches


def test_beside_an_attention_any_view_is_stepped_over() -> None:
    w, x = start()
    q, k, v = (
        w.call(aten.transpose.int, w.call(aten.view.default, w.linear(x, name, 4, 4), [2, 8, 2, 2]), 1, 2)
        for name in "qkv"
    )
    merged = w.call(aten.transpose.int, w.call(aten.scaled_dot_product_attention.default, q, k, v), 1, 2)
    out = w.linear(w.call(aten.reshape.default, merged, [2, 8, 4]), "o", 4, 4)
    lines = ("heads = sdpa(linear(x, W_q), linear(x, W_k), linear(x, W_v))", "out = linear(heads, W_o)")
    (site,) = sites(w, out, lines)
    assert site.path == ""
    assert {"W_q", "W_k", "W_v", "W_o"} <= set(site.taps)


def halves(w: Writer, h: fx.Node, how: str) -> tuple[fx.Node, fx.Node]:
    if how == "slice":
        return w.call(aten.slice.Tensor, h, 2, 0, 3), w.call(aten.slice.Tensor, h, -1, 3, 2**63 - 1)
    calls: dict[str, tuple[Any, Any]] = {
        "chunk": (aten.chunk.default, 2),
        "split": (aten.split.Tensor, 3),
        "sizes": (aten.split_with_sizes.default, [3, 3]),
    }
    target, argument = calls[how]
    parts = w.graph.call_function(target, (h, argument, -1))
    with w.mode:
        parts.meta["val"] = target(h.meta["val"], argument, -1)
    made = []
    for index in range(2):
        node = w.graph.call_function(operator.getitem, (parts, index))
        node.meta["val"] = parts.meta["val"][index]
        made.append(node)
    return made[0], made[1]


@pytest.mark.parametrize("how", ["chunk", "split", "sizes", "slice"])
def test_a_split_is_parts_of_the_last_axis_in_order_however_it_is_spelled(how: str) -> None:
    w, x = start()
    first, second = halves(w, w.linear(x, "fused", 6, 4), how)
    out = w.call(aten.mul.Tensor, w.call(aten.silu.default, first), second)
    program = w.program(out)
    line = "out = silu(g) * u"
    (site,) = find(program, [pattern(("g, u = split(linear(x, W))", line))]).sites
    assert (site.taps["g"].node, site.taps["u"].node) == (first, second)
    assert find(program, [pattern(("u, g = split(linear(x, W))", line))]).sites == []
    assert find(program, [pattern(("g, u, _ = split(linear(x, W))", line))]).sites == []


def test_parts_that_leave_a_gap_are_no_split() -> None:
    w, x = start()
    h = w.linear(x, "fused", 6, 4)
    first, last = w.call(aten.slice.Tensor, h, 2, 0, 2), w.call(aten.slice.Tensor, h, 2, 4, 6)
    out = w.call(aten.mul.Tensor, w.call(aten.silu.default, first), last)
    assert sites(w, out, ("g, u = split(linear(x, W))", "out = silu(g) * u")) == []


def test_nearest_goes_past_what_stands_between() -> None:
    w, x = start()
    q = w.linear(x, "q", 4, 4)
    turned = w.call(aten.add.Tensor, w.call(aten.mul.Tensor, q, 0.5), w.call(aten.neg.default, q))
    (site,) = sites(w, w.call(aten.relu.default, turned), ("q = nearest(linear(x, W))", "out = relu(q)"))
    assert site.taps["q"].node is q


def test_outputs_are_found_from_a_shared_value_and_from_a_shared_parameter() -> None:
    w, x = start()
    left, right = w.linear(x, "l", 6, 4), w.linear(w.call(aten.to.dtype, x, torch.float32), "r", 6, 4)
    both = w.call(aten.cat.default, [left, w.call(aten.tanh.default, right)])
    lines = ("a = linear(x, W_a)", "b = tanh(linear(x, W_b))")
    (site,) = sites(w, both, lines, outputs="[a, b]")
    assert (site.taps["a"].node, site.taps["W_b"].node.name) == (left, "r_weight")
    w = Writer()
    ids = w.placeholder("input", "ids", 2, 8)
    ids.meta["val"] = ids.meta["val"].long()
    table = w.parameter("table", 10, 4)
    embedded = w.call(aten.embedding.default, table, ids)
    logits = w.call(aten.linear.default, w.call(aten.tanh.default, embedded), table)
    (site,) = sites(w, logits, ("e = embedding(ids, W)", "out = linear(y, W)"), outputs="[e, out]")
    assert (site.taps["e"].node, site.taps["W"].node) == (embedded, table)


def test_outputs_that_share_a_value_of_every_layer_cost_no_more_the_deeper_the_model() -> None:
    """Each of the products shares `c` with all of them; what tells its partner is the value nearer to it."""
    made = pattern(("a = tanh(v) * c", "b = relu(v) * c"), outputs="[a, b]")
    for layers in (30, 300):
        w, x = start()
        shared, results = w.placeholder("input", "c", 2, 8, 4), []
        for _ in range(layers):
            x = w.call(aten.neg.default, x)
            one, other = w.call(aten.tanh.default, x), w.call(aten.relu.default, x)
            results += [w.call(aten.mul.Tensor, value, shared) for value in (one, other)]
        program = w.program(*results)
        matcher = Matcher(GraphIndex(program), made.variants[0], Judge(program))
        taken = [(matcher.at(root) is not None, matcher.steps) for root in matcher.roots()]
        assert [matched for matched, _ in taken].count(True) == layers
        assert max(steps for _, steps in taken) <= 20


def test_alternatives_are_tried_in_order_and_may_be_lines_expressions_or_ops() -> None:
    projections = "{any: [['g = linear(x, W_g)', 'u = linear(x, W_u)'], 'g, u = split(linear(x, W))']}"
    made = pattern([projections, "out = any(any(silu, gelu)(g), g * sigmoid(g)) * u"])
    assert len(made.variants) == 4
    for fused in (False, True):
        for act in ("silu", "gelu", "swish"):
            w, x = start()
            gate, up = (
                halves(w, w.linear(x, "fused", 6, 4), "chunk")
                if fused
                else (w.linear(x, "gate", 3, 4), w.linear(x, "up", 3, 4))
            )
            swish = act == "swish"
            mid = (
                w.call(aten.mul.Tensor, w.call(aten.sigmoid.default, gate), gate)
                if swish
                else w.call(getattr(aten, act).default, gate)
            )
            (site,) = find(w.program(w.call(aten.mul.Tensor, mid, up)), [made]).sites
            assert site.taps["g"].node is gate
            assert ("W" in site.taps, "W_g" in site.taps) == (fused, not fused)
            assert set(site.missing) == ({"W_g", "W_u"} if fused else {"W"})


def test_numbers_must_be_equal_and_a_name_takes_any() -> None:
    w, x = start()
    program = w.program(w.call(aten.mul.Tensor, w.call(aten.add.Tensor, x, 1), 0.5))
    assert len(find(program, [pattern("out = 0.5 * (x + 1.0)")]).sites) == 1
    assert find(program, [pattern("out = 0.25 * (x + 1.0)")]).sites == []
    (site,) = find(program, [pattern("out = s * (x + 1)")]).sites
    assert (set(site.taps), site.missing) == ({"out", "x"}, {"s": "`s` is the number 0.5 here"})


def test_conditions_over_sizes_and_readers_hold() -> None:
    w, x = start()
    hidden = w.linear(x, "up", 6, 4)
    out = w.linear(w.call(aten.relu.default, hidden), "down", 4, 6)
    program = w.program(out, w.call(aten.tanh.default, hidden))
    lines = ("h1 = linear(x, U)", "act = relu(h1)", "out = linear(act, D)")

    def count(**keys: str) -> int:
        return len(find(program, [pattern(lines, **keys)]).sites)

    assert count() == 1
    assert (count(single="act"), count(single="h1"), count(single="[act, h1]")) == (1, 0, 0)
    assert count(shapes="{U: [f, d], D: [d, f]}", where="f > d") == 1
    assert count(shapes="{U: [f, d], D: [d, f]}", where="f == d") == 0
    assert count(shapes="{U: [f, d], D: [f, d]}") == 0
    assert (count(shapes="{U: [6, _]}"), count(shapes="{U: [7, _]}"), count(shapes="{U: [f]}")) == (1, 0, 0)


def test_each_root_is_one_site_and_of_matches_that_share_an_output_the_first_stays() -> None:
    w, x = start()
    shared = w.linear(x, "a", 4, 4)
    first, second = w.call(aten.tanh.default, shared), w.call(aten.relu.default, shared)
    last = w.call(aten.tanh.default, w.call(aten.add.Tensor, first, second))
    program = w.program(last, w.call(aten.tanh.default, shared))
    every = find(program, [pattern("out = tanh(y)")]).sites
    assert len(every) == 3
    inner = find(program, [pattern(("a = linear(x, W)", "out = tanh(a)"))]).sites
    assert [site.taps["a"].node for site in inner] == [shared, shared]  # values on the way may be shared
    apart = find(program, [pattern(("a = linear(x, W)", "out = tanh(a)"), outputs="[a, out]")]).sites
    assert [site.taps["out"].node for site in apart] == [first]


def test_a_sum_of_many_is_matched_in_any_order_without_a_search_of_all_orders() -> None:
    """Twenty sums in the reverse order of the pattern's, then with one operand wrong at the bottom."""
    names = [f"v{i}" for i in range(20)]
    line = "out = " + " + ".join(["tanh(x)", *(f"relu({name})" for name in names)])
    for good in (True, False):
        w, x = start()
        total = w.call(aten.tanh.default if good else aten.neg.default, x)
        for index in range(20):
            term = w.call(aten.relu.default, w.placeholder("input", f"y{index}", 2, 8, 4))
            total = w.call(aten.add.Tensor, term, total)
        made = pattern(line)
        program = w.program(total)
        matcher = Matcher(GraphIndex(program), made.variants[0], Judge(program))
        roots = matcher.roots()
        assert (matcher.at(total) is not None) == good
        assert total in roots or not good
        assert matcher.steps <= 3 * 41
        assert len(matcher.judge.judged) <= 4 * 41


def test_a_search_that_would_not_end_is_given_up() -> None:
    """One name at the ends of thirteen products of sums: each sum has two orders that only the last one decides."""
    w, x = start()
    values = [w.placeholder("input", f"y{i}", 2, 8, 4) for i in range(13)]
    total = x
    for value in values:
        total = w.call(aten.mul.Tensor, total, w.call(aten.add.Tensor, value, w.call(aten.neg.default, x)))
    text = "x"
    for index in range(13):
        text = f"({text}) * (a{index} + b{index})"
    result = w.call(aten.tanh.default, total)
    last = w.call(aten.add.Tensor, result, x)
    made = pattern(f"out = tanh({text}) + relu(x)")
    program = w.program(last)
    matcher = Matcher(GraphIndex(program), made.variants[0], Judge(program), explain=True)
    assert matcher.at(last) is None
    assert MAX_STEPS < matcher.steps <= MAX_STEPS + 64
