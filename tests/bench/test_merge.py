"""A merge against copying the same directory, both in one run, and peft's merge on a size that it can hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.big import make_base, make_delta
from peftc.runtime.delta_dir import TENSORS
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import TensorSpec, read_header, read_tensor, write

LAYERS, ROUNDS = 16, 3
LAUNCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process between, for what a process has resident is counted from its parent's on."""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="1GB")
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a command took: seconds with the flush to the disk after it, its own processor seconds, bytes resident."""

    seconds: float
    cpu: float
    peak: int


def timed(*command: object) -> Taken:
    start = time.perf_counter()
    launched = [sys.executable, "-c", LAUNCH, *map(str, command)]
    done = subprocess.run(launched, check=True, capture_output=True, text=True)
    subprocess.run(["sync"], check=True)
    cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return Taken(time.perf_counter() - start, cpu, peak)


def merged(delta: Path, out: Path, certify: str) -> Taken:
    return timed(sys.executable, "-m", "peftc", "merge", delta, "-o", out, "--certify", certify, "-q")


@pytest.mark.bench
def test_a_merge_takes_little_more_than_a_copy_and_little_memory(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LAYERS)
    delta = make_delta(base, tmp_path / "delta")
    size, copies, merges = ModelDir.open(base).nbytes, [], []
    assert size >= 8e9
    for _ in range(ROUNDS):
        copies.append(timed("cp", "-r", base, tmp_path / "copy"))
        shutil.rmtree(tmp_path / "copy")
        merges.append(merged(delta, tmp_path / "merged", "tensors"))
        shutil.rmtree(tmp_path / "merged")
    ratios = sorted(m.seconds / c.seconds for m, c in zip(merges, copies, strict=True))
    work = sorted(m.cpu / c.cpu for m, c in zip(merges, copies, strict=True))
    print(
        f"\n{size / 1e9:.2f} GB, {len(ModelDir.open(base).headers)} shards: cp and sync "
        f"{min(c.seconds for c in copies):.1f} s, merge {min(m.seconds for m in merges):.1f} s, "
        f"ratio {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); of processor seconds "
        f"{min(c.cpu for c in copies):.1f} and {min(m.cpu for m in merges):.1f}, ratio {work[len(work) // 2]:.2f}; "
        f"peak resident {max(m.peak for m in merges) / 1e6:.0f} MB"
    )
    last = merged(delta, tmp_path / "merged", "outputs")
    certificate = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    worst = max(c["absolute"] for c in certificate["comparisons"])
    print(f"with outputs compared: {last.seconds:.1f} s, peak {last.peak / 1e6:.0f} MB, largest difference {worst:.2e}")
    assert max(last.peak, *(m.peak for m in merges)) < 1.5e9


@pytest.mark.bench
def test_a_merge_takes_less_memory_than_pefts(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", 2)
    delta = make_delta(base, tmp_path / "delta")
    adapter = to_peft(delta, tmp_path / "adapter")
    ours = merged(delta, tmp_path / "ours", "tensors")
    theirs = timed(sys.executable, "-c", PEFT, base, adapter, tmp_path / "theirs")
    one, other = ModelDir.open(tmp_path / "ours"), ModelDir.open(tmp_path / "theirs")
    different = [name for name in one.tensors if not one.read(name).equal(other.read(name))]
    print(
        f"\n{one.nbytes / 1e9:.2f} GB: peftc {ours.seconds:.1f} s and {ours.peak / 1e6:.0f} MB, peft "
        f"{theirs.seconds:.1f} s and {theirs.peak / 1e6:.0f} MB; {len(different)} of {len(one.tensors)} tensors differ"
    )
    assert ours.peak < theirs.peak


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
