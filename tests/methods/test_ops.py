"""Every op of the expressions against plain torch: its value, and the gradient of every operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from peftc.diagnostics import PeftcError
from peftc.fold.evaluate import evaluate
from peftc.ir.builder import Builder
from peftc.ir.program import DeltaParameter, Init, Program
from peftc.lang.expr import parse
from peftc.lang.lower import Lowering
from peftc.lang.op_writers import WRITERS
from peftc.lang.ops import OPS

F = torch.nn.functional
Reference = Callable[..., Tensor]

CASES: list[tuple[str, tuple[tuple[int, ...], ...], Reference]] = [
    ("linear(a, b, c)", ((2, 3), (4, 3), (4,)), F.linear),
    ("matmul(a, b)", ((2, 3), (3, 4)), torch.matmul),
    ("einsum('bsd,rd->bsr', a, b)", ((2, 3, 4), (5, 4)), lambda a, b: torch.einsum("bsd,rd->bsr", a, b)),
    ("outer(a, b)", ((3,), (4,)), torch.outer),
    ("kron(a, b)", ((2, 3), (4, 5)), torch.kron),
    ("kron(a, b)", ((6, 2, 3), (6, 4, 5)),
     lambda a, b: torch.stack([torch.kron(x, y) for x, y in zip(a, b, strict=True)])),
    ("transpose(a, 0, 1)", ((2, 3),), lambda a: a.transpose(0, 1)),
    ("permute(a, [2, 0, 1])", ((2, 3, 4),), lambda a: a.permute(2, 0, 1)),
    ("reshape(a, [3, -1])", ((2, 3),), lambda a: a.reshape(3, -1)),
    ("flatten(a)", ((2, 3, 4),), lambda a: a.flatten()),
    ("flatten(a, 1, 2)", ((2, 3, 4),), lambda a: a.flatten(1, 2)),
    ("unflatten(a, -1, [2, 3])", ((2, 6),), lambda a: a.unflatten(-1, (2, 3))),
    ("unsqueeze(a, 1)", ((2, 3),), lambda a: a.unsqueeze(1)),
    ("squeeze(a, 1)", ((2, 1, 3),), lambda a: a.squeeze(1)),
    ("expand(a, [4, -1])", ((1, 3),), lambda a: a.expand(4, -1)),
    ("repeat(a, [2, 3])", ((2, 3),), lambda a: a.repeat(2, 3)),
    ("roll(a, 2)", ((2, 5),), lambda a: a.roll(2, -1)),
    ("roll(a, -1, dim=0)", ((3, 5),), lambda a: a.roll(-1, 0)),
    ("flip(a, dim=0)", ((3, 5),), lambda a: a.flip(0)),
    ("concat(a, b)", ((2, 3), (2, 4)), lambda a, b: torch.cat([a, b], -1)),
    ("stack(a, b, dim=1)", ((2, 3), (2, 3)), lambda a, b: torch.stack([a, b], 1)),
    ("split_heads(a, 2)", ((2, 3, 8),), lambda a: a.unflatten(-1, (2, 4)).transpose(1, 2)),
    ("merge_heads(a)", ((2, 4, 3, 5),), lambda a: a.transpose(1, 2).flatten(2)),
    ("gather(a, [0, 2, -1, 2])", ((2, 4),), lambda a: a[:, [0, 2, -1, 2]]),
    ("gather(a, [1, 2, 3, 0, 3], dim=0)", ((4, 2),), lambda a: a[[1, 2, 3, 0, 3]]),
    ("gather(a, [1, 0], dim=0)", ((2, 4),), lambda a: a[[1, 0]]),
    ("gather(a, minimum(floor(abs(b)), 3))", ((2, 4), (5,)),
     lambda a, b: a[:, b.abs().clamp(max=3).long()]),
    ("scatter(a, minimum(abs(b), 1), minimum(abs(c), 2), [2, 3])", ((6,), (6,), (6,)),
     lambda a, b, c: a.new_zeros(2, 3).index_put(
         (b.abs().clamp(max=1).long(), c.abs().clamp(max=2).long()), a, accumulate=True)),
    ("place(a, [5, 0, 1, 3], 6)", ((4, 2),), lambda a: a.new_zeros(6, 2).index_add(0, torch.tensor([5, 0, 1, 3]), a)),
    ("place(a, [4], size(b, 0)) * b", ((1,), (5,)), lambda a, b: torch.eye(5, dtype=a.dtype)[4] * a * b),
    ("size(a, 1) * a", ((2, 3),), lambda a: 3 * a),
    ("full([2, size(a, 1)], 2.5) * a", ((2, 3),), lambda a: 2.5 * a),
    ("concat(full([2, 1], -1, like=a), a)", ((2, 3),), lambda a: torch.cat([-torch.ones(2, 1, dtype=a.dtype), a], 1)),
    ("a + zeros([2, 3])", ((3,),), lambda a: a.expand(2, 3)),
    ("a * ones([2, 3])", ((3,),), lambda a: a.expand(2, 3)),
    ("a * full([2, 3], 0.5)", ((3,),), lambda a: 0.5 * a.expand(2, 3)),
    ("eye(3) @ a", ((3, 2),), lambda a: a),
    ("range(3) * a", ((3,),), lambda a: a * torch.arange(3)),
    ("diag(a)", ((2, 3),), torch.diag_embed),
    ("block_diag(a)", ((4, 2, 3),), lambda a: torch.block_diag(*a)),
    ("block_diag(a)", ((2, 4, 2, 3),), lambda a: torch.stack([torch.block_diag(*part) for part in a])),
    ("diagonal(a)", ((2, 3, 3),), lambda a: a.diagonal(0, -2, -1)),
    ("triu(a, 1)", ((3, 3),), lambda a: a.triu(1)),
    ("tril(a)", ((3, 3),), lambda a: a.tril()),
    ("skew(a)", ((2, 6),), lambda a: _skew(a, 4)),
    ("circulant(a)", ((2, 4),), lambda a: torch.stack([a.roll(i, -1) for i in range(4)], -2)),
    ("orthonormal(a)", ((2, 4),), lambda a: _gram_schmidt(a)),
    ("solve(a + 5 * eye(3), b)", ((3, 3), (3, 2)), lambda a, b: torch.linalg.solve(a + 5 * torch.eye(3), b)),
    ("inverse(a + 5 * eye(3))", ((3, 3),), lambda a: (a + 5 * torch.eye(3)).inverse()),
    ("fft_real(a)", ((2, 5),), lambda a: torch.fft.fft(a).real),
    ("fft_imag(a, dim=0)", ((3, 5),), lambda a: torch.fft.fft(a, dim=0).imag),
    ("ifft_real(a, b)", ((2, 5), (2, 5)), lambda a, b: torch.fft.ifft(torch.complex(a, b)).real),
    ("ifft_real(a)", ((2, 5),), lambda a: torch.fft.ifft(a).real),
    ("ifft2_real(a)", ((3, 5),), lambda a: torch.fft.ifft2(a).real),
    ("relu(a)", ((2, 3),), F.relu),
    ("gelu(a)", ((2, 3),), F.gelu),
    ("gelu_tanh(a)", ((2, 3),), lambda a: F.gelu(a, approximate="tanh")),
    ("silu(a)", ((2, 3),), F.silu),
    ("tanh(a)", ((2, 3),), torch.tanh),
    ("sigmoid(a)", ((2, 3),), torch.sigmoid),
    ("softplus(a)", ((2, 3),), F.softplus),
    ("identity(a)", ((2, 3),), lambda a: a),
    ("softmax(a, dim=0)", ((2, 3),), lambda a: a.softmax(0)),
    ("logsumexp(a)", ((2, 3),), lambda a: a.logsumexp(-1, keepdim=True)),
    ("exp(a)", ((2, 3),), torch.exp),
    ("log(abs(a))", ((2, 3),), lambda a: a.abs().log()),
    ("sin(a)", ((2, 3),), torch.sin),
    ("cos(a)", ((2, 3),), torch.cos),
    ("sqrt(abs(a))", ((2, 3),), lambda a: a.abs().sqrt()),
    ("rsqrt(abs(a))", ((2, 3),), lambda a: a.abs().rsqrt()),
    ("a * sign(a)", ((2, 3),), lambda a: a * a.sign()),
    ("a * floor(a)", ((2, 3),), lambda a: a * a.floor()),
    ("a * round(a)", ((2, 3),), lambda a: a * a.round()),
    ("clamp(a, -1, 1)", ((2, 3),), lambda a: a.clamp(-1, 1)),
    ("minimum(a, b, 0.5)", ((2, 3), (3,)), lambda a, b: torch.minimum(a, b).clamp(max=0.5)),
    ("maximum(a, b)", ((2, 3), (3,)), torch.maximum),
    ("greater(a, 0) * a", ((2, 3),), lambda a: (a > 0) * a),
    ("less(a, b) * a", ((2, 3), (3,)), lambda a, b: (a < b) * a),
    ("where(greater(a, b), a, b)", ((2, 3), (2, 3)), lambda a, b: torch.where(a > b, a, b)),
    ("where(greater(a, 0), a, 2.0)", ((2, 3),), lambda a: torch.where(a > 0, a, 2.0)),
    ("where(greater(a, 0), 2.0, a)", ((2, 3),), lambda a: torch.where(a > 0, 2.0, a)),
    ("mean(a, dim=0)", ((2, 3),), lambda a: a.mean(0, keepdim=True)),
    ("sum(a)", ((2, 3),), lambda a: a.sum(-1, keepdim=True)),
    ("cumsum(a)", ((2, 3),), lambda a: a.cumsum(-1)),
    ("amax(a)", ((2, 3),), lambda a: a.amax(-1, keepdim=True)),
    ("amin(a, dim=0)", ((2, 3),), lambda a: a.amin(0, keepdim=True)),
    ("norm(a)", ((2, 3),), lambda a: a.norm(dim=-1, keepdim=True)),
    ("layer_norm(a, b, c)", ((2, 3), (3,), (3,)), lambda a, b, c: F.layer_norm(a, (3,), b, c)),
    ("rms_norm(a, b)", ((2, 3), (3,)), lambda a, b: F.rms_norm(a, (3,), b, 1e-6)),
    ("dropout(a, 0.0)", ((2, 3),), lambda a: a),
    ("a * detach(a)", ((2, 3),), lambda a: a * a.detach()),
]  # fmt: skip


def _skew(v: Tensor, n: int) -> Tensor:
    rows, columns = torch.triu_indices(n, n, 1)
    upper = v.new_zeros(*v.shape[:-1], n, n).index_put((torch.arange(len(v))[:, None], rows, columns), v)
    return upper - upper.mT


def _gram_schmidt(rows: Tensor) -> Tensor:
    found: list[Tensor] = []
    for row in rows:
        left = row - sum((row @ q * q for q in found), torch.zeros_like(row))
        found.append(left / left.norm())
    return torch.stack(found)


class Bench:
    """A graph with nothing but parameters, named a, b, c where no names are given, and expressions of them."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...] | dict[str, tuple[int, ...]]) -> None:
        base = torch.export.export(torch.nn.Linear(1, 1).to("meta"), (torch.zeros(1, 1, device="meta"),))
        self.program = Program.from_exported(base)
        generator = torch.Generator().manual_seed(0)
        parameters = {
            name: DeltaParameter(name, shape, torch.float64, Init("zeros"), delta="test")
            for name, shape in (shapes if isinstance(shapes, dict) else dict(zip("abc", shapes, strict=False))).items()
        }
        self.nodes = {name: self.program.add_parameter(parameter) for name, parameter in parameters.items()}
        self.values = {
            name: (2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).requires_grad_()
            for name, p in parameters.items()
        }

    def lower(self, expression: str) -> fx.Node:
        cursor = list(self.program.bindings)[-1]
        lowering = Lowering(Builder(self.program, cursor, label="test"), self.nodes, "the bench")
        return lowering.tensor(parse(expression))

    def run(self, wanted: fx.Node) -> Tensor:
        """With gradients, in the order of the graph."""
        feeds: dict[fx.Node, Any] = {node: self.values[name] for name, node in self.nodes.items()}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and all(operand in feeds for operand in node.all_input_nodes):
                args, kwargs = pytree.tree_map_only(
                    torch.device, lambda _: torch.device("cpu"), fx.map_arg((node.args, node.kwargs), feeds.__getitem__)
                )
                feeds[node] = node.target(*args, **kwargs)
        return feeds[wanted]


def test_every_op_of_the_table_has_a_writer_and_a_case() -> None:
    assert set(WRITERS) == set(OPS)
    assert {name for name in OPS if not any(f"{name}(" in case for case, _, _ in CASES)} == set()


@pytest.mark.parametrize(("expression", "shapes", "reference"), CASES, ids=[case for case, _, _ in CASES])
def test_op_is_what_torch_computes(expression: str, shapes: tuple[tuple[int, ...], ...], reference: Reference) -> None:
    bench = Bench(shapes)
    wanted = bench.lower(expression)
    operands = list(bench.values.values())
    got = bench.run(wanted)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        expected = reference(*operands)
    finally:
        torch.set_default_dtype(previous)
    assert got.shape == expected.shape == wanted.meta["val"].shape
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).reshape(got.shape)
    gradients = [torch.autograd.grad((value * weight).sum(), operands, allow_unused=True) for value in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "expression",
    ["gather(a, minimum(floor(abs(b)), 3))", "skew(b)[0] @ a.T", "circulant(a)", "solve(a @ a.T + eye(2), a)"],
)
def test_a_fold_computes_the_same_in_its_own_dtype(expression: str, dtype: torch.dtype) -> None:
    bench = Bench(((2, 4), (6,) if "skew(b)" not in expression else (1, 6)))
    wanted = bench.lower(expression)
    value = evaluate(bench.program, wanted, {}, lambda name: bench.values[name].detach(), dtype)
    torch.testing.assert_close(value.double(), bench.run(wanted).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("expression", "shapes", "told"),
    [
        ("skew(a)", ((5,),), "n (n - 1) / 2"),
        ("orthonormal(a)", ((4, 2),), "cannot be orthonormal"),
        ("gather(a, [7])", ((2, 4),), "from -4 to 3"),
        ("kron(a, b)", ((3,), (2, 2)), "does not fit"),
        ("inverse(a)", ((3, 2),), "does not fit"),
    ],
)
def test_operands_that_do_not_fit_are_told(expression: str, shapes: tuple[tuple[int, ...], ...], told: str) -> None:
    with pytest.raises(PeftcError, match="E013") as raised:
        Bench(shapes).lower(expression)
    assert told in str(raised.value)
