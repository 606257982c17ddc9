"""`rewrite:` replaces several taps at once: held to hooks and patched modules, and to what may fold of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.harness import Folded, apply_rule, difference, gradients, inputs, output, scramble, tiny
from torch import Tensor

from peftc import driver
from peftc.checking.check import check
from peftc.diagnostics import PeftcError
from peftc.ir.zero import starts_as_identity

WORST = 1e-5
Edit = Callable[[Any, dict[str, Tensor]], None]
"""Makes a BERT compute what an entry says, given the delta parameters."""


def text(entries: str) -> str:
    return f"peftc: 1\nname: mine\nhyper: {{r: 4}}\nrewrite:\n{entries}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    tiny("bert").save_pretrained(directory)
    return directory


def exchange(model: Any, deltas: dict[str, Tensor]) -> None:
    own = model.encoder.layer[0].attention.self
    own.query, own.key = own.key, own.query


def skip(model: Any, deltas: dict[str, Tensor]) -> None:
    def block(_: Any, given: Any, result: Any) -> Any:
        return (given[0], *result[1:]) if isinstance(result, tuple) else given[0]

    model.encoder.layer[1].register_forward_hook(block)


def gated(model: Any, deltas: dict[str, Tensor]) -> None:
    for index, layer in enumerate(model.encoder.layer):
        g = deltas[f"encoder.layer.{index}.peftc.gate.g"]

        def block(_: Any, given: Any, result: Any, g: Tensor = g) -> Any:
            h = result[0] if isinstance(result, tuple) else result
            h = given[0] + torch.sigmoid(g) * (h - given[0])
            return (h, *result[1:]) if isinstance(result, tuple) else h

        layer.register_forward_hook(block)


def mixed(model: Any, deltas: dict[str, Tensor]) -> None:
    """Of each FFN the input doubled (for the residual as well), and its old input added to the output: both at once."""
    for index, layer in enumerate(model.encoder.layer):
        g = deltas[f"encoder.layer.{index}.peftc.mixed.g"]
        seen: list[Tensor] = []

        def double(_: Any, given: Any, h: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(h)
            return 2 * h

        def out(_: Any, given: Any, h: Tensor, g: Tensor = g, seen: list[Tensor] = seen) -> Tensor:
            return h + g * seen[-1]

        layer.attention.output.LayerNorm.register_forward_hook(double)
        layer.output.dense.register_forward_hook(out)


def shared(model: Any, deltas: dict[str, Tensor]) -> None:
    """One projection down, read by both."""
    for index, layer in enumerate(model.encoder.layer):
        A, B, C = (deltas[f"encoder.layer.{index}.attention.peftc.lora.{name}"] for name in "ABC")
        for module, up in ((layer.attention.self.query, B), (layer.attention.self.value, C)):

            def edit(_: Any, given: Any, h: Tensor, A: Tensor = A, up: Tensor = up) -> Tensor:
                return h + given[0] @ A.T @ up.T

            module.register_forward_hook(edit)


def beside(model: Any, deltas: dict[str, Tensor]) -> None:
    """A branch of attention beside each block: one head over what enters it, with a causal-free softmax."""
    for index, layer in enumerate(model.encoder.layer):
        Q, K, V, O = (deltas[f"encoder.layer.{index}.peftc.branch.{name}"] for name in ("Q", "K", "V", "O"))  # noqa: E741

        def block(_: Any, given: Any, result: Any, Q: Tensor = Q, K: Tensor = K, V: Tensor = V, O: Tensor = O) -> Any:  # noqa: E741
            h, x = result[0] if isinstance(result, tuple) else result, given[0]
            scores = (x @ Q.T) @ (x @ K.T).transpose(1, 2) / 2
            h = h + scores.softmax(-1) @ (x @ V.T) @ O.T
            return (h, *result[1:]) if isinstance(result, tuple) else h

        layer.register_forward_hook(block)


BRANCH = """
  branch:
    at: block
    params:
      Q: {shape: [r, d_model], init: kaiming_uniform}
      K: {shape: [r, d_model], init: kaiming_uniform}
      V: {shape: [r, d_model], init: kaiming_uniform}
      O: {shape: [d_model, r], init: zeros}
    let:
      weights: "softmax(linear(x, Q) @ linear(x, K).T / r ** 0.5)"
    set: {out: "out + linear(weights @ linear(x, V), O)"}
"""
LORA = """
  lora:
    at: attention
    params:
      A: {shape: [r, d_in], init: kaiming_uniform}
      B: {shape: [d_out, r], init: zeros}
      C: {shape: [d_out, r], init: zeros}
    let: {z: "linear(x, A)"}
    set: {q: "q + linear(z, B)", v: "v + linear(z, C)"}
"""
LAYERED = f"peftc: 1\nname: mine\nhyper: {{r: RANK}}\nrewrite:\n{LORA}"
CASES: dict[str, tuple[str, Edit, set[str]]] = {
    "exchange": ("  exchange: {at: attention, where: {layers: [0]}, set: {q: k, k: q}}\n", exchange, {"kept"}),
    "skip": ("  skip: {at: block, where: {layers: [-1]}, set: {out: x}}\n", skip, {"kept"}),
    "gated skip": ("  gate: {at: block, params: {g: {shape: [1], init: zeros}},"
                   ' set: {out: "x + sigmoid(g) * (out - x)"}}\n', gated, {"kept"}),
    "old values": ("  mixed: {at: ffn, params: {g: {shape: [d_model], init: ones}},"
                   " set: {x: 2 * x, out: out + g * x}}\n", mixed, {"kept"}),
    "shared": (LORA, shared, {"merged"}),
    "branch": (BRANCH, beside, {"kept"}),
}  # fmt: skip


def compared(name: str, base: Path) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    """The adapted model and the hooked one, and the parameters of both."""
    entries, edit, _ = CASES[name]
    ours, theirs = apply_rule(text(entries), base, {}), tiny("bert")
    names = list(ours.surgery.plan.parameters)
    scramble((name, ours.get_parameter(name)) for name in names)
    deltas = {name: ours.get_parameter(name).detach().clone().requires_grad_() for name in names}
    edit(theirs, deltas)
    return ours, theirs, [ours.get_parameter(name) for name in names], list(deltas.values())


@pytest.mark.parametrize("name", CASES)
def test_an_entry_computes_what_its_expressions_say(name: str, bert: Path) -> None:
    ours, theirs, own, other = compared(name, bert)
    program = ours.program_for(inputs())
    zero = all(starts_as_identity(program, entry) for entry in program.ledger)
    assert zero == (name in ("shared", "branch")), "an entry that adds zero starts as the identity, and no other does"
    expected = output(theirs)
    assert difference(expected, output(tiny("bert"))) > 1e-2
    assert difference(output(ours), expected) <= WORST
    if own:
        pairs = zip(gradients(ours, own), gradients(theirs, other), strict=True)
        assert max(difference(a, b) for a, b in pairs) <= WORST


@pytest.mark.parametrize("name", CASES)
def test_what_is_affine_in_its_own_tap_folds_and_the_rest_is_kept(name: str, bert: Path) -> None:
    ours, theirs, _, _ = compared(name, bert)
    folded = Folded.of(ours)
    assert folded.results == CASES[name][2]
    if folded.results == {"merged"}:
        assert difference(output(folded.into(tiny("bert"))), output(theirs)) <= WORST


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(PeftcError) as raised:
        yield
    assert {d.code for d in raised.value.diagnostics} == {code}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "skip" else pytest.mark.slow) for n in CASES])
def test_an_entry_exports_and_a_checkpoint_of_what_stays_is_refused(name: str, bert: Path, tmp_path: Path) -> None:
    entries, _, results = CASES[name]
    ours = apply_rule(text(entries), bert, {})
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    ours.save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "onnx", export={"onnx"})
    comparisons = json.loads((tmp_path / "onnx" / "certificate.json").read_text())["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)
    if results == {"kept"}:
        with refused("E037"):
            driver.merge(tmp_path / "delta", tmp_path / "hf", export={"hf"})


def test_a_tap_after_a_skipped_block_is_no_other_than_its_own(bert: Path) -> None:
    """What the skipped block passes on is changed, and what enters the block stays."""
    entries = "  skip: {at: block, where: {layers: [0]}, set: {out: x}}\n"
    entries += "  scale: {at: block, where: {layers: [0]}, set: {out: 3 * out + 0 * x}}\n"
    entries += '  add: {at: block, where: {layers: [1]}, from: {e: "block[0].x"}, set: {out: out + e}}\n'
    ours, theirs = apply_rule(text(entries), bert, {}), tiny("bert")
    entered: list[Tensor] = []

    def first(_: Any, given: Any, result: Any) -> Any:
        entered.append(given[0])
        return (3 * given[0], *result[1:]) if isinstance(result, tuple) else 3 * given[0]

    def second(_: Any, given: Any, result: Any) -> Any:
        h = (result[0] if isinstance(result, tuple) else result) + entered[-1]
        return (h, *result[1:]) if isinstance(result, tuple) else h

    theirs.encoder.layer[0].register_forward_hook(first)
    theirs.encoder.layer[1].register_forward_hook(second)
    assert difference(output(ours), output(theirs)) <= WORST


WRONG: dict[str, tuple[str, str, str, str]] = {
    "a circle": ("{at: ffn, set: {x: out}}", "E024", "out", "`x` cannot be changed here: `out` is computed from it"),
    "another shape": ("{at: ffn, set: {out: \"out[:, :, 0:3]\"}}", "E013", "out[:, :, 0:3]", "`out` is [s"),
    "a number": ("{at: ffn, set: {out: 2 * layer}}", "E009", "2 * layer", "not a tensor"),
    "a tap read that is not here": ("{at: ffn, set: {out: out * gate}}", "E004", "gate", "reads `gate` of ffn"),
    "a tap set that is not here": ("{at: ffn, set: {gate: x}}", "E004", "gate", "sets `gate` of ffn"),
    "no gradient": ("{at: ffn, params: {g: {shape: [1], init: ones}}, set: {out: out * sign(g)}}", "E024", "a",
                    "no gradient reaches its parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_model_cannot_take_is_told_at_its_token(case: str, bert: Path, tmp_path: Path) -> None:
    entry, code, token, message = WRONG[case]
    file = tmp_path / "t.yaml"
    file.write_text(f"peftc: 1\nname: mine\nrewrite:\n  a: {entry}\n", encoding="utf-8")
    (checked,) = check([str(file)], model=bert).files
    (found,) = [d for d in checked.diagnostics if d.severity == "error"]
    assert found.code == code
    assert message in found.message
    assert found.span is not None
    assert found.span.text[found.span.col - 1 : found.span.end_col - 1] == token


def test_what_a_site_lacks_is_left_out_where_the_entry_says_so(bert: Path) -> None:
    ours = apply_rule(text('  a: {at: ffn, set: {"gate?": 2 * gate, out: 2 * out}}\n'), bert, {})
    theirs = tiny("bert")
    for layer in theirs.encoder.layer:
        layer.output.dense.register_forward_hook(lambda _, given, h: 2 * h)
    assert difference(output(ours), output(theirs)) <= WORST


def test_values_of_layers_and_a_budget_hold_in_an_entry(bert: Path) -> None:
    """The rank is twice as large in the last layer; the budget is what three tensors of rank 3 need, and 10 more."""
    width = tiny("bert").config.hidden_size
    layered = LAYERED.replace("RANK", "{default: 2, layers: {last 1: 4}}")
    shapes = {name: tuple(p.shape) for name, p in apply_rule(layered, bert, {}).surgery.plan.parameters.items()}
    for layer, r in ((0, 2), (1, 4)):
        names = {"A": (r, width), "B": (width, r), "C": (width, r)}
        for name, shape in names.items():
            assert shapes[f"encoder.layer.{layer}.attention.peftc.lora.{name}"] == shape
    layers = tiny("bert").config.num_hidden_layers
    limit = layers * 3 * 3 * width + 10
    plan = apply_rule(LAYERED.replace("RANK", f"{{budget: {limit}}}"), bert, {}).surgery.plan
    assert (plan.rule.values["r"], plan.trained_count) == (3, limit - 10)
    assert plan.budget is not None
