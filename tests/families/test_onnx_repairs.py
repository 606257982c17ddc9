"""Places that torch's ONNX converter stumbles over: rewritten, the graph computes the same and converts."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from peftc.backends.onnx_repairs import repair


class _Whole(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x > 0).to(torch.long)
        return (1.0 - mask) * -1e4 + mask * 2.0


class _OneKind(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.histc(x.flatten(), 1)


class _Longer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1) + 1.0


class _Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.polar(torch.ones_like(x), x)[:, 1:]
        pairs = torch.view_as_complex(torch.stack([x, x], -1))[:, 1:]
        return torch.view_as_real(pairs[:, :, None] * turned.unsqueeze(-1))


@pytest.mark.parametrize("module", [_Whole(), _OneKind(), _Longer(), _Complex()])
def test_what_the_converter_stumbles_over_is_written_otherwise(module: torch.nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    sizes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=sizes)
    repair(program.graph)
    expected = module(x)
    written = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    assert written is not None
    written.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-6)
