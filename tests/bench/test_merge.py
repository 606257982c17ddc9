"""A merge against copying the same directory, both in one run, and peft's merge on a size that it can hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.big import make_base, make_delta
from peftc.runtime.delta_dir import TENSORS
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import TensorSpec, read_header, read_tensor, write

LAYERS, ROUNDS = 16, 3
MERGE = """
import json, resource, sys
from peftc import driver
driver.merge(*sys.argv[1:3], outputs=sys.argv[3] == "outputs")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""
PEFT = """
import json, resource, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="1GB")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


def timed(*command: object) -> tuple[float, str]:
    """Seconds of a command and of the flush to the disk after it, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start, done.stdout


def merged(delta: Path, out: Path, certify: str) -> tuple[float, int]:
    seconds, printed = timed(sys.executable, "-c", MERGE, delta, out, certify)
    return seconds, json.loads(printed.splitlines()[-1])


@pytest.mark.bench
def test_a_merge_takes_little_more_than_a_copy_and_little_memory(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LAYERS)
    delta = make_delta(base, tmp_path / "delta")
    size, copies, merges, peaks = ModelDir.open(base).nbytes, [], [], []
    assert size >= 8e9
    for turn in range(ROUNDS):
        copies.append(timed("cp", "-r", base, tmp_path / "copy")[0])
        shutil.rmtree(tmp_path / "copy")
        seconds, peak = merged(delta, tmp_path / "merged", "tensors")
        merges.append(seconds)
        peaks.append(peak)
        if turn < ROUNDS - 1:
            shutil.rmtree(tmp_path / "merged")
    ratios = sorted(m / c for m, c in zip(merges, copies, strict=True))
    print(
        f"\n{size / 1e9:.2f} GB, {len(ModelDir.open(base).headers)} shards: cp and sync {min(copies):.1f} s, "
        f"merge {min(merges):.1f} s, ratio {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"peak resident {max(peaks) / 1e6:.0f} MB"
    )
    shutil.rmtree(tmp_path / "merged")
    seconds, peak = merged(delta, tmp_path / "merged", "outputs")
    certificate = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    worst = max(c["absolute"] for c in certificate["comparisons"])
    print(f"with outputs compared: {seconds:.1f} s, peak {peak / 1e6:.0f} MB, largest difference {worst:.2e}")
    assert max(*peaks, peak) < 1.5e9


@pytest.mark.bench
def test_a_merge_takes_less_memory_than_pefts(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", 2)
    delta = make_delta(base, tmp_path / "delta")
    adapter = to_peft(delta, tmp_path / "adapter")
    ours, peak = merged(delta, tmp_path / "ours", "tensors")
    theirs, printed = timed(sys.executable, "-c", PEFT, base, adapter, tmp_path / "theirs")
    theirs_peak = json.loads(printed.splitlines()[-1])
    one, other = ModelDir.open(tmp_path / "ours"), ModelDir.open(tmp_path / "theirs")
    different = [name for name in one.tensors if not one.read(name).equal(other.read(name))]
    print(
        f"\n{one.nbytes / 1e9:.2f} GB: peftc {ours:.1f} s and {peak / 1e6:.0f} MB, peft {theirs:.1f} s and "
        f"{theirs_peak / 1e6:.0f} MB; {len(different)} of {len(one.tensors)} tensors differ"
    )
    assert peak < theirs_peak


def to_peft(delta: Path, directory: Path) -> Path:
    """The same numbers as an adapter of peft."""
    header = read_header(delta / TENSORS)
    places = {name: re.sub(r"\.peftc\.lora\.([AB])$", r".lora_\1.weight", name) for name in header.tensors}
    directory.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    of = {f"base_model.model.{place}": name for name, place in places.items()}
    specs = [TensorSpec(key, header.tensors[name].dtype, header.tensors[name].shape) for key, name in of.items()]
    write(directory / "adapter_model.safetensors", specs, lambda key: read_tensor(header, of[key]), {"format": "pt"})
    return directory
