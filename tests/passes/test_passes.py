"""What each pass does to a program, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from peftc.diagnostics import PeftcError
from peftc.ir.program import is_call
from peftc.ir.zero import starts_as_identity
from peftc.passes.set_mode import SetMode
from peftc.passes.verify import Verify
from peftc.pipeline import PASSES, load_pass, rewrite
from peftc.runtime.executor import Executor

aten = torch.ops.aten

BOTTLENECK = "{at: ffn, modify: out, insert: parallel, form: bottleneck, compose: h + 4 * dh}"


def test_every_pass_is_a_class_that_bears_its_name():
    for name in PASSES:
        assert load_pass(name).name == name


def test_an_unknown_pass_is_answered_with_the_nearest_name():
    with pytest.raises(PeftcError, match="did you mean `insert`"):
        load_pass("insrt")


def test_normalize_leaves_one_linear_where_conv1d_was(gpt2):
    calls = [node for node in gpt2.graph.nodes if node.op == "call_function"]
    assert not any(is_call(node, aten.addmm.default, aten._assert_tensor_metadata.default) for node in calls)
    assert sum(is_call(node, aten.linear.default) for node in calls) == 5  # c_attn, c_proj, c_fc, c_proj, lm_head


def test_evaluation_mode_switches_every_dropout_off(bert):
    SetMode(training=False).apply_to(bert.graph)
    for node in bert.graph.nodes:
        if is_call(node, aten.dropout.default):
            assert node.args[2] is False
        if is_call(node, aten.scaled_dot_product_attention.default):
            assert node.args[4] == 0.0


def test_insert_adds_only_its_own_nodes_and_parameters(bert, rule):
    before = set(bert.graph.nodes)
    plan = rewrite(bert, rule(BOTTLENECK))
    added = [node for node in bert.graph.nodes if node not in before]
    assert before <= set(bert.graph.nodes)
    assert all(node.op == "placeholder" or node.meta["custom"]["peftc"] == "d" for node in added)
    assert {node.op for node in added} == {"placeholder", "call_function"}
    assert [b.name for n, b in bert.bindings.items() if n in set(added)] != []
    assert set(plan.parameters) == {name for name in bert.placeholders("parameter") if ".peftc." in name}


def test_freeze_trains_the_deltas_and_what_the_rule_names(bert, rule):
    plan = rewrite(bert, rule(BOTTLENECK), fresh={"pooler.dense.weight"})
    assert bert.trainable == {*plan.parameters, "pooler.dense.weight"}


def test_verify_names_the_pass_that_lost_a_binding(bert):
    bert.bindings.popitem()
    with pytest.raises(AssertionError, match="after pass `mine`"):
        Verify(after="mine").apply(bert)


def test_a_parameter_without_gradient_is_refused(bert, rule):
    row = (
        "{at: ffn, modify: out, form: {expr: '(sign(v) if d_in == d_out else v) * h', "
        "params: {v: {shape: [d_out], init: ones}}}, insert: sequential}"
    )
    with pytest.raises(PeftcError, match="no gradient reaches its parameter"):
        rewrite(bert, rule(row))


def test_a_wrong_shape_is_told_with_both_shapes_and_the_module(bert, rule):
    row = "{at: ffn, modify: out, insert: parallel, form: {expr: x @ W, params: {W: {shape: [4, d_in], init: zeros}}}}"
    with pytest.raises(PeftcError) as caught:
        rewrite(bert, rule(row))
    message = str(caught.value)
    assert "E013" in message
    assert "test.yaml:5:" in message
    assert "x is [B, S, d_in=32] but W is [4, d_in=32]" in message
    assert "encoder.layer.0" in message
    assert "transpose" in message


def test_a_result_that_does_not_broadcast_to_h_is_refused(bert, rule):
    form = "{expr: 'linear(x, W)', params: {W: {shape: [4, d_in], init: zeros}}}"
    row = f"{{at: ffn, modify: out, insert: parallel, form: {form}, compose: dh}}"
    with pytest.raises(PeftcError, match=r"the new value is \[B, S, 4\], but `out` is \[B, S, d_out=32\]"):
        rewrite(bert, rule(row))


COPIED = (
    "{{at: ffn, modify: up, form: '{order}', params: {{A: {{shape: [d_out, d_in], init: 0.1 * weight}}, "
    "C: {{shape: [d_out, d_in], init: {init}, frozen: true}}}}}}"
)


@pytest.mark.parametrize(
    ("row", "identity"),
    [
        (BOTTLENECK, True),
        ("{at: attention, modify: [q, v], insert: parallel, form: low_rank}", True),
        ("{at: ffn, modify: out, insert: sequential, form: bottleneck_bert}", False),
        ("{at: attention, modify: heads, insert: parallel, form: prefix, compose: gate, with: {l: 3}}", False),
        (COPIED.format(init="A", order="linear(x, A) - linear(x, C)"), True),
        (COPIED.format(init="A", order="linear(x * A[0], A) - linear(x * C[0], C)"), True),
        (COPIED.format(init="0.5 * A", order="linear(x, A) - linear(x, C)"), False),
        (COPIED.format(init="A", order="linear(x, A) - linear(x, 2 * C)"), False),
    ],
)
def test_a_start_as_identity_is_proven_exactly_where_it_holds(bert, bert_skeleton, rule, row, identity):
    plan = rewrite(bert, rule(row))
    assert all(starts_as_identity(bert, insertion) is identity for insertion in bert.ledger)
    assert _changes_nothing(bert, plan, bert_skeleton) is identity


def _changes_nothing(program, plan, skeleton) -> bool:
    """Run the rewritten graph at the start against the same graph with every delta taken out."""
    from peftc.runtime.init import Initializer

    torch.manual_seed(0)
    state = {name: torch.randn(p.shape) * 0.1 for name, p in skeleton.model.named_parameters()} | skeleton.buffers
    start = Initializer(plan.parameters, 0, state.__getitem__, pytest.fail)
    state |= {name: start(name) for name in plan.parameters}
    inputs = {name: torch.randint(1, 99, (2, 7)) for name in program.inputs}
    inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    from peftc.frontend.trace import default_inputs
    from peftc.pipeline import analyse

    plain = analyse(skeleton, default_inputs(skeleton.model))
    cpu = torch.device("cpu")
    got = Executor(program, training=False, device=cpu).flat(state, inputs)
    want = Executor(plain, training=False, device=cpu).flat(state, inputs)
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_parameter_or_an_op_that_bears_a_taps_name_is_not_the_tap(bert, rule):
    plan = rewrite(
        bert, rule("{at: attention, modify: [q, k], insert: sequential, form: vector}")
    )  # its parameter is v
    assert len(plan.edits) == 4


def test_a_delta_that_reads_what_comes_after_its_tap_is_refused(bert, rule):
    form = "{expr: 'linear(concat, W)', params: {W: {shape: [d_out, d_out], init: zeros}}}"
    with pytest.raises(PeftcError, match="a value that is computed from `q`"):
        rewrite(bert, rule(f"{{at: attention, modify: q, insert: sequential, form: {form}}}"))


def test_a_delta_may_read_what_the_trace_happens_to_compute_later(bert, rule):
    form = "{expr: 'linear(v, W)', params: {W: {shape: [d_out, d_out], init: zeros}}}"
    rewrite(bert, rule(f"{{at: attention, modify: q, insert: sequential, form: {form}}}"))
    assert all(starts_as_identity(bert, entry) for entry in bert.ledger)
    bert.propagate()


def test_a_prompt_longer_than_the_models_positions_is_refused(rule):
    import transformers

    from peftc.frontend.trace import build_skeleton, default_inputs
    from peftc.pipeline import analyse

    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    skeleton = build_skeleton(transformers.BertModel, config)
    program = analyse(skeleton, default_inputs(skeleton.model))
    row = "{at: model, modify: embeddings, insert: sequential, form: prompt, compose: prepend, with: {l: 100}}"
    with pytest.raises(PeftcError, match="takes no sequence that is 100 longer"):
        rewrite(program, rule(row))


def test_training_a_tied_parameter_by_its_second_name_trains_the_one_there_is(gpt2, rule):
    from peftc.lang.loader import parse_rule

    plan = rewrite(gpt2, parse_rule('peftc: 1\nname: head\ntrain: ["lm_head.*"]\n', "test.yaml"))
    assert plan.trained == ("transformer.wte.weight",)
    assert plan.trained_count == 99 * 32
