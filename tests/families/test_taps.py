"""Taps hold the values that the modules compute: hooks on the plain model against the graph's nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from families.conftest import Subject, trace
from families.family import HEADS, HIDDEN, Family
from peftc.ir.builder import Builder
from peftc.ir.program import Program
from peftc.runtime.executor import Executor
from peftc.runtime.graph_model import state_of

Taps = dict[tuple[str, str], Tensor]
TOLERANCE = 1e-5


def test_taps_hold_what_the_modules_compute(subject: Subject) -> None:
    program, inputs = trace(subject), subject.family.inputs()
    found = tap_values(program, subject.model, inputs)
    seen = module_values(subject.model, inputs)
    expected = {
        **attention_values(subject.family, subject.model, seen),
        **ffn_values(subject.family, subject.model, seen),
    }
    assert set(expected) <= set(found)
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert (found[key] - value).abs().max() <= TOLERANCE, key


def test_the_residual_is_what_the_ffn_is_added_to(subject: Subject) -> None:
    """out + residual, normed or scaled as the model does, is what leaves the block; here: it is the sum itself."""
    program = trace(subject)
    for site in program.sites:
        if site.kind == "ffn":
            residual, out = site.taps["residual"].node, site.taps["out"].node
            assert residual is not out
            assert tuple(residual.meta["val"].shape) == tuple(out.meta["val"].shape), site.path


def tap_values(program: Program, model: nn.Module, inputs: dict[str, Tensor]) -> Taps:
    """Run the plain graph with every attention and FFN tap, in canonical layout, as a further output."""
    wanted: dict[tuple[str, str], fx.Node] = {}
    for site in program.sites:
        if site.kind in ("attention", "ffn"):
            for name, tap in site.taps.items():
                wanted[site.path, name] = tap.read(program, Builder(program, tap.node, label="test"))
    output = program.output_node
    outputs = list(output.args[0])  # pyright: ignore[reportArgumentType]
    output.args = ((*outputs, *wanted.values()),)
    with torch.no_grad():
        executor = Executor(program, training=False, device=torch.device("cpu"))
        values = executor.flat(state_of(model), inputs)
    return dict(zip(wanted, values[len(outputs) :], strict=True))


def module_values(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every module in a forward of the plain model."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen[name] = (args[0], output)

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def attention_values(family: Family, model: nn.Module, seen: dict[str, tuple[Tensor, Tensor]]) -> Taps:
    values: Taps = {}
    for path in family.attention_modules(model):
        roles = {role: f"{path}.{name}" for role, name in family.roles_of(path).items()}
        concat, out = seen[roles["o"]]
        values[path, "out"] = out
        values[path, "concat"] = concat
        values[path, "heads"] = concat.unflatten(-1, (HEADS, family.head_dim)).transpose(1, 2)
        if "qkv" in roles:
            x = seen[roles["qkv"]][0]
            parts, ctx = fused_parts(family, model.get_submodule(roles["qkv"]), x), x
        else:
            x, ctx = seen[roles["q"]][0], seen[roles["v"]][0]
            parts = tuple(seen[roles[role]][1] for role in "qkv")
        values.update({(path, "x"): x, (path, "ctx"): ctx})
        values.update({(path, role): part for role, part in zip("qkv", parts, strict=True)})
    return values


def fused_parts(family: Family, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v of a fused projection computed from its weight, as each family lays it out."""
    weight, bias = module.get_parameter("weight"), dict(module.named_parameters()).get("bias")
    if family.name == "gpt2":  # [in, 3 · out], thirds
        return tuple((x @ weight + bias).split(HIDDEN, dim=-1))
    full = x @ weight.T + (0 if bias is None else bias)
    if family.name == "bloom":  # heads, then q, k, v of each
        split = full.unflatten(-1, (HEADS, 3, family.head_dim))
        return tuple(split[..., index, :].flatten(-2) for index in range(3))
    assert family.name == "phi3"  # q of every head, then k and v of the grouped ones
    return tuple(full.split([family.head_dim * n for n in (HEADS, family.kv_heads, family.kv_heads)], dim=-1))


def ffn_values(family: Family, model: nn.Module, seen: dict[str, tuple[Tensor, Tensor]]) -> Taps:
    values: Taps = {}
    for path in family.ffn_modules(model):
        roles = {role: f"{path}.{name}" for role, name in family.ffn_roles.items()}
        values[path, "mid"], values[path, "out"] = seen[roles["down"]]
        if "gate_up" in roles:
            x, fused = seen[roles["gate_up"]]
            gate, up = fused.chunk(2, dim=-1)
            values.update({(path, "gate"): gate, (path, "up"): up})
        else:
            x = seen[roles["up"]][0]
            values.update({(path, role): seen[roles[role]][1] for role in ("gate", "up") if role in roles})
        values[path, "x"] = x
    return values
