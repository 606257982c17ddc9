"""An ONNX export of a model that is larger than the memory it may take."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.big import make_base, make_delta, middling
from peftc.store.model_dir import ModelDir

EXPORT = """
import json, resource, sys
from peftc import driver
driver.merge(*sys.argv[1:3], export={"onnx"}, outputs=sys.argv[3] == "outputs")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""
WHOLE = """
import json, sys, numpy, onnxruntime, torch, peftc
ids = torch.randint(0, 32000, (2, 9), generator=torch.Generator().manual_seed(7))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(2, -1)}
with torch.no_grad():
    expected = peftc.load(sys.argv[1])(**inputs).logits.numpy()
session = onnxruntime.InferenceSession(sys.argv[2] + "/model.onnx", providers=["CPUExecutionProvider"])
feeds = {name: value.numpy() for name, value in inputs.items()}
for argument in session.get_inputs():
    if argument.name.startswith("past"):
        heads, width = argument.shape[1], argument.shape[3]
        feeds[argument.name] = numpy.zeros((2, heads, 0, width), numpy.float32)
found = session.run(["logits"], feeds)[0]
print(json.dumps([float(abs(found - expected).max()), float(abs(expected).max())]))
"""


def run(code: str, *arguments: object) -> tuple[float, str]:
    """Seconds of a program, and the last line that it printed."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout.splitlines()[-1]


@pytest.mark.bench
def test_an_export_of_more_than_2_gb_takes_less_and_equals_torch(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", settings=middling())
    delta, out = make_delta(base, tmp_path / "delta"), tmp_path / "out"
    size = ModelDir.open(base).nbytes
    seconds, printed = run(EXPORT, delta, out, "tensors")
    peak = json.loads(printed)
    again, printed = run(EXPORT, delta, out, "outputs")
    certified = json.loads(printed)
    comparisons = json.loads((out / "certificate.json").read_text())["comparisons"]
    difference, scale = json.loads(run(WHOLE, delta, out)[1])
    written = (out / "model.onnx.data").stat().st_size
    print(
        f"\n{size / 1e9:.2f} GB exported in {seconds:.1f} s, peak resident {peak / 1e6:.0f} MB; compared as well "
        f"{again:.1f} s, {certified / 1e6:.0f} MB, largest difference {max(c['absolute'] for c in comparisons):.1e}; "
        f"whole in onnxruntime and torch: {difference:.1e} of {scale:.1f}"
    )
    assert size > 2e9 and written > 2e9
    assert peak < 2e9 and certified < 2e9
    assert comparisons and difference < 1e-4 * max(1.0, scale)
