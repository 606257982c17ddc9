"""The example package, installed: its rule, form and op are found, checked, run and exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.harness import inputs, output, scramble, tiny
from torch import Tensor
from typer.testing import CliRunner

import peftc
from extension.support import install_example
from peftc import driver
from peftc.cli import app
from peftc.diagnostics import PeftcError
from peftc.lang import library
from peftc.lang.loader import parse_rule
from peftc.runtime.delta_dir import DeltaDir

RANK = 3


@pytest.fixture
def example(site: Path) -> Path:
    install_example(site)
    return site


def adapted(tmp_path: Path) -> tuple[Any, Any]:
    """The plain and the adapted tiny BERT, the deltas at random values."""
    base = tiny("bert")
    base.save_pretrained(tmp_path / "base")
    ours = peftc.apply("squared_adapter", tmp_path / "base", set={"r": RANK})
    scramble((name, ours.get_parameter(name)) for name in ours.surgery.plan.parameters)
    return base, ours


class Squared(torch.nn.Module):
    """BERT's output layer by hand, with gain * W_up max(W_down x, 0)^2 added before its LayerNorm."""

    def __init__(self, layer: Any, delta: dict[str, Tensor]) -> None:
        super().__init__()
        self.dense, self.norm = layer.dense, layer.LayerNorm
        self.delta = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in delta.items()})

    def forward(self, middle: Tensor, x: Tensor) -> Tensor:
        z = torch.clamp(x @ self.delta["W_down"].T, min=0) ** 2
        return self.norm(self.dense(middle) + self.delta["gain"] * (z @ self.delta["W_up"].T) + x)


def by_hand(base: Any, ours: Any) -> tuple[Any, list[str]]:
    """The plain model with `Squared` in its layers, holding our values; and our names in its order."""
    names = []
    for index, layer in enumerate(base.encoder.layer):
        own = {name.split(".")[-1]: name for name in ours.surgery.plan.parameters if f"layer.{index}." in name}
        layer.output = Squared(layer.output, {s: ours.get_parameter(name).detach().clone() for s, name in own.items()})
        names += own.values()
    return base, names


def test_check_finds_no_mistake_and_imports_no_torch(example: Path) -> None:
    code = (
        "import sys\nfrom peftc.checking.check import check\n"
        "report = check(['squared_adapter', 'houlsby'], {'r': 8})\n"
        "assert 'peftc_squared.ops' in sys.modules and 'torch' not in sys.modules\n"
        "assert 'peftc_squared.writers' not in sys.modules\n"
        "print(report.summary)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(example)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 rules, 0 errors, 0 warnings\n", "")


def test_help_looks_for_no_package() -> None:
    code = "import sys\nfrom peftc.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "assert not {'peftc.lang.extensions', 'importlib.metadata'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.usefixtures("example")
def test_listings_say_where_each_comes_from() -> None:
    listed = CliRunner().invoke(app, ["rules"])
    assert listed.exit_code == 0
    (row,) = (line for line in listed.output.splitlines() if line.startswith("squared_adapter"))
    assert " r=16 " in row and row.rstrip().endswith(" peftc-squared 0.1.0")
    rules = {r["name"]: r["from"] for r in json.loads(CliRunner().invoke(app, ["rules", "--json"]).output)}
    assert (rules["squared_adapter"], rules["mam"]) == ("peftc-squared 0.1.0", "peftc")
    ops = {op["name"]: op["from"] for op in json.loads(CliRunner().invoke(app, ["ops", "--json"]).output)["ops"]}
    assert (ops["squared_relu"], ops["relu"]) == ("peftc-squared 0.1.0", "peftc")
    patterns = {p["name"]: p["from"] for p in json.loads(CliRunner().invoke(app, ["patterns", "--json"]).output)}
    assert (patterns["squared_ffn"], patterns["plain_ffn"]) == ("peftc-squared 0.1.0", "peftc")
    assert "(So et al. 2021) (peftc-squared 0.1.0)" in CliRunner().invoke(app, ["ops"]).output


@pytest.mark.usefixtures("example")
def test_output_and_gradients_equal_a_layer_by_hand(tmp_path: Path) -> None:
    base, ours = adapted(tmp_path)
    base, ours = base.double(), ours.double()
    reference, names = by_hand(base, ours)
    expected, got = output(reference), output(ours)
    assert float((expected - got).abs().max()) <= 1e-12
    assert float((expected - output(tiny("bert").double())).abs().max()) > 1e-3
    wanted = [p for layer in reference.encoder.layer for p in layer.output.delta.values()]
    mine = [ours.get_parameter(name) for name in names]
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    mask = inputs()["attention_mask"].bool()
    grads = [
        torch.autograd.grad((model(**inputs())[0][mask] * weight).sum(), parameters)
        for model, parameters in ((reference, wanted), (ours, mine))
    ]
    for theirs, own in zip(*grads, strict=True):
        assert float((theirs - own).abs().max()) <= 1e-12 * max(1.0, float(theirs.abs().max()))


@pytest.mark.usefixtures("example")
def test_op_serves_as_a_word_in_rules_of_the_library(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    plan = driver.plan("houlsby", tmp_path / "base", {"f": "squared_relu", "r": 4}).to_json()
    assert {fold["result"] for fold in plan["folds"]} == {"kept"}


@pytest.mark.usefixtures("example")
def test_shapes_go_through_the_op_without_a_model() -> None:
    row = "{at: ffn, modify: out, form: 'linear(squared_relu(linear(x, A)), B)', params: {A: %s, B: %s}}"
    params = ["{shape: [r, d_in], init: zeros}", "{shape: [r, d_out], init: zeros}"]
    text = f"peftc: 1\nname: t\nhyper: {{r: 2}}\ndeltas:\n  a: {row % tuple(params)}\n"
    with pytest.raises(PeftcError, match=r"squared_relu\(linear\(x, A\)\) is \[\.\., r\] but B is \[r, d_out\]"):
        parse_rule(text, "t.yaml")


def relu2(folder: Path) -> Path:
    """A tiny BERT whose FFN has squared ReLU."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, hidden_act="relu2", **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("example")
def test_adapter_with_the_ffn_s_own_activation_widens(tmp_path: Path) -> None:
    plan = driver.plan("squared_adapter", relu2(tmp_path / "base")).to_json()
    assert [(fold["result"], fold["sites"]) for fold in plan["folds"]] == [("widened", 2)]


def test_delta_directory_holds_form_and_pattern_and_names_the_package_of_the_op(example: Path, tmp_path: Path) -> None:
    row = "{at: squared_ffn, modify: out, form: squared_bottleneck, expect: 2}"
    rule = parse_rule(f"peftc: 1\nname: t\nhyper: {{r: 2}}\ndeltas:\n  a: {row}\n", "t.yaml")
    model = peftc.apply(rule, relu2(tmp_path / "base"))
    model.save_pretrained(tmp_path / "delta")
    assert DeltaDir.open(tmp_path / "delta").rule.text == rule.text
    (next(example.glob("*.dist-info")) / "entry_points.txt").unlink()  # as if it were not installed
    library.forget()
    with pytest.raises(PeftcError) as caught:
        DeltaDir.open(tmp_path / "delta")
    assert [d.code for d in caught.value.diagnostics] == ["E007", "E045"]
    assert "`peftc-squared 0.1.0` cannot be used: the rule calls ops of it" in caught.value.diagnostics[1].message
    alone = parse_rule(rule.text.replace("squared_relu(", "relu("), "t.yaml")
    assert (alone.deltas[0].form.name, [*alone.patterns]) == ("squared_bottleneck", ["squared_ffn"])


@pytest.mark.usefixtures("example")
@pytest.mark.slow
def test_adapted_model_exports_to_onnx_and_is_kept_out_of_a_plain_checkpoint(tmp_path: Path) -> None:
    _, ours = adapted(tmp_path)
    ours.save_pretrained(tmp_path / "delta")
    with pytest.raises(PeftcError, match="`relu` is not affine"):
        driver.merge(tmp_path / "delta", tmp_path / "plain", export={"hf"})
    driver.merge(tmp_path / "delta", tmp_path / "out", export={"onnx"})
    comparisons = json.loads((tmp_path / "out" / "certificate.json").read_text())["comparisons"]
    assert comparisons and all(comparison["holds"] for comparison in comparisons)
