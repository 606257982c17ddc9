"""Two processes on the CPU, over gloo, do what one does: DDP and FSDP2, by hand and through accelerate and Trainer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftc
from peftc.diagnostics import PeftcError
from peftc.lang.loader import parse_rule
from runtime.tiny import batch, moved

TESTS = Path(__file__).parents[1]
EXAMPLE = TESTS.parent / "examples" / "distributed"
SEVERAL = """\
peftc: 1
name: several
extends: mam
deltas:
  direction: {at: linear, where: {role: [q, v]}, modify: weight, insert: sequential, form: magnitude_direction,
              with: {s: 2.0}, compose: dh}
"""
"""A prefix, an adapter, and weights that are computed of parameters alone."""
BLOCKS = ["model.layers.0", "model.layers.1"]
SUMS = 1e-12
"""What float64 may differ by: two processes add the gradients of rows in another order."""
LOSS = 1e-6
"""The same for a loss, which Llama computes in float32."""


def test_a_sharded_model_trains_and_saves_as_the_whole_one(
    alone: None, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    from torch.distributed.fsdp import fully_shard

    rule = parse_rule(SEVERAL, "several.yaml")
    model = moved(peftc.apply(rule, model_dir("llama"), set={"l": 3, "r": 4}, dtype=torch.float64))
    shards = copy.deepcopy(model)
    for layer in shards.model.layers:
        fully_shard(layer)
    fully_shard(shards)
    for one in (model, shards):
        one.train()(**batch()).logits.square().sum().backward()
    assert [step.unit for step in list(shards.surgery.executors.values())[-1].parts.steps if step.unit] == BLOCKS
    for name in model.surgery.plan.trainable:
        assert torch.equal(shards.get_parameter(name).grad.full_tensor(), model.get_parameter(name).grad), name
    model.save_pretrained(tmp_path / "whole")
    shards.save_pretrained(tmp_path / "sharded")
    assert same_files(tmp_path / "whole", tmp_path / "sharded")
    shards.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_parameters_gathered_in_another_dtype_compute_in_it_as_those_of_the_base(
    alone: None, model_dir: Callable[[str], Path], plain: Callable[[str], Any]
) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found = []
    for model in (peftc.apply("lora", model_dir("llama")), plain("llama")):
        for module in (*model.model.layers, model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        found.append(model.train()(**batch()).logits)
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)
    found[0].float().square().sum().backward()


def test_a_parameter_that_is_sharded_where_it_is_read_is_an_error(
    alone: None, model_dir: Callable[[str], Path]
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = peftc.apply("lora", model_dir("bert"))
    fully_shard(model.bert.encoder.layer[1].attention.peftc)  # nothing calls it, so nothing gathers it
    with pytest.raises(PeftcError, match=r"E041 error: bert.encoder.layer.1.attention.peftc.* is sharded where"):
        model(**batch())


def same_files(one: Path, other: Path) -> bool:
    """Whether two directories hold files of the same names and bytes."""
    files = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    return files[0] == files[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in files[0])


def launched(*command: str | Path, **environment: str) -> str:
    """What a command prints; it has to end well, and in time."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), str(EXAMPLE), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, *map(str, command)], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


RUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def found(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("two")
    launched(*RUN, TESTS / "runtime" / "two_processes.py", model_dir("llama"), out)
    return {**json.loads((out / "found.json").read_text()), "out": out}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "checkpointed"])
def test_losses_and_deltas_are_those_of_one_process(found: dict[str, Any], way: str) -> None:
    assert found[way] == pytest.approx(found["one"], rel=LOSS)
    assert len(set(found["one"])) == len(found["one"])
    assert found[f"{way} difference"] < SUMS


@pytest.mark.slow
def test_sharded_blocks_are_called_one_by_one(found: dict[str, Any]) -> None:
    assert [unit for unit in found["called"] if unit] == BLOCKS


@pytest.mark.slow
def test_a_sharded_model_saves_the_delta_directory_of_one_process(found: dict[str, Any]) -> None:
    assert same_files(found["out"] / "one-start", found["out"] / "fsdp-start")
    trained, wanted = (load_file(found["out"] / name / "delta.safetensors") for name in ("fsdp", "one"))
    assert trained.keys() == wanted.keys()
    assert all(torch.allclose(trained[name], value, rtol=0, atol=SUMS) for name, value in wanted.items())
    logits = [peftc.load(found["out"] / name)(**batch()).logits for name in ("fsdp", "one")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_in_parts_is_loaded_into_parts(found: dict[str, Any]) -> None:
    assert found["loaded loss is the saved model's"]
    assert found["loaded difference"] < SUMS


def example(config: str, out: Path, *options: str) -> list[float]:
    """The losses that the example prints, started as its page says."""
    script = (EXAMPLE / "train.py", "--out", out, "--steps", "4", "--save-steps", "2", *options)
    config_file = ("-m", "accelerate.commands.launch", "--config_file", EXAMPLE / f"{config}.yaml")
    printed = launched(*(config_file if config else ()), *script)
    line = next(line for line in printed.splitlines() if line.startswith("losses"))
    return [float(word) for word in line.split()[1:]]


@pytest.mark.slow
def test_trainer_under_accelerate_trains_resumes_and_saves_alike_however_the_model_lies(tmp_path: Path) -> None:
    """Dropout is drawn in each process from its own seed, so that the runs of two are equal, byte for byte."""
    losses = {config: example(config, tmp_path / config) for config in ("ddp", "fsdp2")}
    assert losses["ddp"] == losses["fsdp2"]
    assert same_files(tmp_path / "ddp" / "delta", tmp_path / "fsdp2" / "delta")
    options = ("--resume", str(tmp_path / "fsdp2" / "checkpoint-2"), "--checkpointing")
    assert example("fsdp2", tmp_path / "on", *options) == losses["fsdp2"]
    assert same_files(tmp_path / "fsdp2" / "delta", tmp_path / "on" / "delta")
    assert example("", tmp_path / "one") == pytest.approx(losses["ddp"], abs=0.02), "but for dropout"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("ddp", ()),
        ("fsdp2", ()),
        ("fsdp2", ("activation_checkpointing=true",)),
        ("fsdp2", ("bf16=true",)),
        ("ddp", ("sft=true",)),
        ("fsdp2", ("sft=true",)),
    ],
)
def test_trainer_of_a_causal_model_logs_the_losses_of_one_process(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, settings: Any
) -> None:
    """Rows of unequal length, two accumulated batches a step: every token counts once, wherever its row lies."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from runtime.two_trainers import run

    given = {key: json.loads(value) for key, value in (word.split("=") for word in settings)}
    (tmp_path / "one").mkdir()
    one = run(model_dir("llama"), tmp_path / "one", 1, given)
    launch = ("-m", "accelerate.commands.launch", "--config_file", EXAMPLE / f"{config}.yaml")
    wrap = ("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer") if config == "fsdp2" else ()
    precise = "bf16=true" not in settings
    launch += () if precise else ("--mixed_precision", "bf16")  # the argument of Trainer asks for a GPU
    script = TESTS / "runtime" / "two_trainers.py"
    launched(*launch, *wrap, script, model_dir("llama"), tmp_path, *(settings if precise else ()))
    two = json.loads((tmp_path / "losses.json").read_text())
    assert two == pytest.approx(one, rel=1e-5 if precise else 5e-3)
    tensors = [load_file(folder / "delta" / "delta.safetensors") for folder in (tmp_path / "one", tmp_path)]
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, rtol=0, atol=1e-4 if precise else 2e-2)
