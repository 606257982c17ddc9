"""Values of `carry` on a small BERT and Llama, held to hooks on the plain model in float64: zFLoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from torch import Tensor, nn

from methods.harness import Folded, apply_rule, difference, gradients, output, scramble, tiny
from peftc import driver
from peftc.checking.check import check

WORST = 1e-10
READERS = ("query", "key", "value", "intermediate.dense", "q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")


def _plain(family: str) -> Any:
    return tiny(family).double()


def _blocks(family: str, model: Any) -> tuple[str, Any]:
    return ("encoder.layer", model.encoder.layer) if family == "bert" else ("model.layers", model.model.layers)


def _delta(deltas: dict[str, Tensor], block: str, row: str, words: tuple[str, ...] = ("",)) -> Tensor:
    """The one parameter of `row` in `block` whose name has one of `words`."""
    (found,) = (
        tensor
        for name, tensor in deltas.items()
        if name.startswith(f"{block}.") and f".peftc.{row}." in name and any(word in name for word in words)
    )
    return found


def hooked(family: str, deltas: dict[str, Tensor]) -> Any:
    """The plain model with the stream beside it, by hooks."""
    model = _plain(family)
    root, blocks = _blocks(family, model)
    z: list[Tensor] = []

    def opened(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            z[:] = [x @ _delta(deltas, path, "open").T]

        return hook

    def read(name: str) -> Any:
        def hook(_: nn.Module, given: Any, h: Tensor) -> Tensor:
            return h + z[0] @ deltas[name].T

        return hook

    def added(path: str, last: bool) -> Any:
        def hook(_: nn.Module, given: Any, result: Any) -> Any:
            out = result[0] if isinstance(result, tuple) else result
            z[:] = [z[0] + out @ _delta(deltas, path, "z").T]
            if not last:
                return result
            after = out + z[0] @ _delta(deltas, path, "merge").T
            return (after, *result[1:]) if isinstance(result, tuple) else after

        return hook

    for index, block in enumerate(blocks):
        path = f"{root}.{index}"
        if index == 0:
            block.register_forward_pre_hook(opened(path), with_kwargs=True)
        for name, module in block.named_modules():
            if name.endswith(READERS):
                module.register_forward_hook(read(_reader(deltas, f"{path}.{name}")))
        block.register_forward_hook(added(path, last=index == len(blocks) - 1))
    return model


def _reader(deltas: dict[str, Tensor], path: str) -> str:
    """The parameter that the projection at `path` reads the stream by."""
    owner, _, word = path.rpartition(".")
    names = [f"{path}.peftc.ffn.B"]
    names += [f"{place}.peftc.attention.{word[0]}.B" for place in (owner, owner.removesuffix(".self"))]
    (found,) = {name for name in names if name in deltas}
    return found


def test_a_value_that_is_a_tap_stays_what_it_was_when_the_tap_is_changed(tmp_path: Path) -> None:
    _plain("bert").save_pretrained(tmp_path)
    params = "params: {g: {shape: [d_out], init: zeros}}"
    ours = apply_rule(
        "peftc: 1\n"
        "name: older\n"
        "carry: {z: {at: block, value: out}}\n"
        "deltas:\n"
        f"  own: {{at: block, modify: out, from: {{z: z}}, {params}, form: g * z}}\n"
        f"  next: {{at: block, where: {{layers: [1]}}, modify: out, from: {{z: 'z[0]'}}, {params}, form: g * z}}\n",
        tmp_path,
        {},
    )
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    g = {
        name.partition("peftc.")[2][0] + name.split(".")[2]: p for name, p in ours.named_parameters() if "peftc" in name
    }
    theirs, seen = _plain("bert"), []

    def hook(index: int) -> Any:
        def changed(_: nn.Module, given: Any, result: Any) -> Any:
            h = result[0] if isinstance(result, tuple) else result
            seen.append(h)
            h = h + g[f"o{index}"] * h
            h = h + g["n1"] * seen[0] if index else h
            return (h, *result[1:]) if isinstance(result, tuple) else h

        return changed

    for index, block in enumerate(theirs.encoder.layer):
        block.register_forward_hook(hook(index))
    assert difference(output(ours), output(_plain("bert"))) > 1e-2
    assert difference(output(ours), output(theirs)) <= WORST


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_zflora_is_a_stream_beside_the_model(family: str, tmp_path: Path) -> None:
    _plain(family).save_pretrained(tmp_path)
    ours = apply_rule("zflora", tmp_path, {"r": 3})
    assert difference(output(ours), output(_plain(family))) <= WORST
    names = list(ours.surgery.plan.parameters)
    scramble((name, ours.get_parameter(name)) for name in names)
    deltas = {name: ours.get_parameter(name).detach().clone().requires_grad_() for name in names}
    assert all(tensor.dtype == torch.float64 for tensor in deltas.values())
    theirs = hooked(family, deltas)
    assert difference(output(theirs), output(_plain(family))) > 1e-2
    apart = difference(output(ours), output(theirs))
    found = gradients(ours, [ours.get_parameter(name) for name in names])
    wanted = gradients(theirs, deltas.values())
    assert all(bool(gradient.abs().max() > 0) for gradient in wanted)
    steep = max(difference(one, other) for one, other in zip(found, wanted, strict=True))
    record("zflora", "hooks on the plain model", WORST, outputs=apart, gradients=steep)
    assert max(apart, steep) <= WORST
    assert Folded.of(ours).results == {"kept"}


def test_a_carried_value_is_exported(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    ours = apply_rule("zflora", tmp_path / "base", {"r": 3})
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    ours.save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"})
    comparisons = json.loads((tmp_path / "out" / "certificate.json").read_text())["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)


def _told(carry: str, source: str, base: Path) -> list[tuple[str, str]]:
    """The errors of a row that reads `source` at the FFN of the first layer, each with the text at its place."""
    row = f"{{at: ffn, where: {{layers: [0]}}, modify: out, from: {{z: '{source}'}}, form: tanh(z)}}"
    file = base / "t.yaml"
    file.write_text(f"peftc: 1\nname: mine\ncarry:\n  z: {carry}\ndeltas:\n  read: {row}\n", encoding="utf-8")
    (checked,) = check([str(file)], model=base).files
    lines = file.read_text(encoding="utf-8").splitlines()
    errors = [d for d in checked.diagnostics if d.severity == "error"]
    return [(d.code, lines[d.span.line - 1]) for d in errors if d.span is not None]


def test_a_carried_value_without_an_order_is_refused_where_it_is_named(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    chain = "{at: block, from: {y: 'z[%s] or model.embeddings'}, value: relu(y) + tanh(x)}"
    assert _told(chain % "layer - 1", "z[0]", tmp_path) == []
    ((code, line),) = _told(chain % "layer - 1", "z[1]", tmp_path)
    assert code == "E024" and line.startswith("  read:")
    ((code, line),) = _told(chain % "1 - layer", "z[0]", tmp_path)
    assert code == "E051" and line.startswith("  z:")
    alone = "{at: block, from: {y: 'z[layer - 1]'}, value: relu(y)}"
    ((code, line),) = _told(alone, "z[0]", tmp_path)
    assert code == "E026" and line.startswith("  z:")
