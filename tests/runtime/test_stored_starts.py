"""Starts from stored deltas: AdapterFusion over two trained adapters, a sum of two LoRAs, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from torch import Tensor

import peftc
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.lang.loader import load_rule, parse_rule
from runtime.tiny import batch

F = torch.nn.functional


def stored(rule: str, base: Path, target: Path, seed: int, **values: object) -> Path:
    """A delta directory with random values, as if trained."""
    model = peftc.apply(rule, base, set=values)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in model.surgery.plan.parameters:
            parameter = model.get_parameter(name)
            parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def adapters(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    paths = [stored("pfeiffer", model_dir("bert-base"), folder / str(i), i, r=5) for i in range(2)]
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def loras(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    paths = [stored("lora", model_dir("bert-base"), folder / str(i), i, r=3) for i in range(2)]
    return paths[0], paths[1]


def fused(plain: Any, models: list[Any], Q: list[Tensor], K: list[Tensor], V: list[Tensor]) -> Any:
    """AdapterFusion by hooks on the layers of the plain model, from the adapters' own models (Pfeiffer et al. 2021)."""
    for index, layer in enumerate(plain.encoder.layer):

        def hook(_: Any, __: Any, h: Any, index: int = index) -> Any:
            outputs = []
            for model in models:
                own = model.encoder.layer[index].peftc.adapter
                outputs.append(F.linear(F.relu(F.linear(h, own.W_down, own.b_down)), own.W_up, own.b_up))
            z = torch.stack(outputs, dim=2)  # [B, S, N, d]
            weight = ((h @ Q[index].T)[:, :, None] * (z @ K[index].T)).sum(-1).softmax(-1)
            return h + (weight[..., None] * (z @ V[index].T)).sum(2)

        layer.register_forward_hook(hook)
    return plain


def test_fusion_attends_over_the_stored_adapters_and_trains_itself_alone(
    model_dir: Callable[[str], Path], plain: Callable[[str], Any], adapters: tuple[Path, Path]
) -> None:
    first, second = adapters
    model = peftc.apply("adapter_fusion", model_dir("bert-base"), set={"first": first, "second": second, "r": 5})
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"Q", "K", "V"}
    own = [layer.peftc.fusion for layer in model.encoder.layer]
    with torch.no_grad():
        for index, module in enumerate(own):
            for name in "QK":
                getattr(module, name).normal_(0.0, 0.5, generator=torch.Generator().manual_seed(index))
            torch.testing.assert_close(module.V, torch.eye(32), atol=2e-6, rtol=0)
            module.V.add_(torch.linspace(-0.3, 0.3, 32 * 32).reshape(32, 32))
    parts = ([getattr(module, name) for module in own] for name in "QKV")
    expected = fused(plain("bert-base"), [peftc.load(path) for path in adapters], *parts)
    wanted, got = expected(**batch())[0], model(**batch())[0]
    apart = float((got - wanted).detach().abs().max())
    weight = torch.linspace(-1, 1, got.numel()).reshape(got.shape)
    tensors = [getattr(module, name) for module in own for name in "QKV"]
    ours, theirs = (torch.autograd.grad((out * weight).mean(), tensors) for out in (got, wanted))
    slope = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    record("adapter_fusion", "hooks on the plain model", 1e-5, outputs=apart, gradients=slope)
    assert max(apart, slope) <= 1e-5
    assert min(float(a.abs().max()) for a in ours) > 1e-7


def test_command_line_and_python_start_alike_and_the_result_needs_the_stored_no_more(
    model_dir: Callable[[str], Path], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    copies = [shutil.copytree(path, tmp_path / path.name) for path in adapters]
    sets = {"first": str(copies[0]), "second": str(copies[1]), "r": "5"}
    model = peftc.apply("adapter_fusion", model_dir("bert-base"), set=sets)
    driver.apply("adapter_fusion", model_dir("bert-base"), tmp_path / "out", sets=sets)
    for path in copies:
        shutil.rmtree(path)
    again = peftc.load(tmp_path / "out")
    for name in model.surgery.plan.parameters:
        assert torch.equal(again.get_parameter(name), model.get_parameter(name)), name


def test_sum_of_two_loras_is_their_weighted_sum_and_merges(
    model_dir: Callable[[str], Path], plain: Callable[[str], Any], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = {"first": str(loras[0]), "second": str(loras[1]), "r": "3", "a": "0.7", "b": "-0.2"}
    driver.apply("lora_mix", model_dir("bert-base"), tmp_path / "mix", sets=sets)
    driver.merge(tmp_path / "mix", tmp_path / "merged")
    base, merged = plain("bert-base"), type(plain("bert-base")).from_pretrained(tmp_path / "merged")
    for share, path in zip((0.7, -0.2), loras, strict=True):
        tensors = peftc.load(path)
        for index, layer in enumerate(base.encoder.layer):
            own = tensors.encoder.layer[index].attention.peftc.lora
            for tap, linear in (("q", layer.attention.self.query), ("v", layer.attention.self.value)):
                part = getattr(own, tap)
                linear.weight.data += share * 16 / 3 * part.B.detach() @ part.A.detach()
    apart = max(float((merged.state_dict()[name] - tensor).abs().max()) for name, tensor in base.state_dict().items())
    record("lora_mix", "the weights by hand", 1e-5, weights=apart)
    assert apart <= 1e-5


def test_a_stored_delta_of_another_head_is_found(
    model_dir: Callable[[str], Path], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = {"first": loras[0], "second": loras[1], "r": 3}
    model = peftc.apply("lora_mix", model_dir("bert-base"), set=sets, head="sequence-classification", num_labels=2)
    own = peftc.load(loras[1]).encoder.layer[1].attention.peftc.lora.v.B
    assert torch.equal(model.bert.encoder.layer[1].attention.peftc.mix.v.B_2, own)


def refused(base: Path, out: Path, rule: str, **sets: object) -> Any:
    with pytest.raises(PeftcError) as caught:
        driver.apply(rule, base, out, sets=sets)
    assert not out.exists()
    (told,) = caught.value.diagnostics
    return told


def test_what_is_wrong_with_a_stored_delta_is_told(
    model_dir: Callable[[str], Path], loras: tuple[Path, Path], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    base, out, first = model_dir("bert-base"), tmp_path / "out", str(loras[0])
    told = refused(base, out, "lora_mix", first=first, r="3")
    assert (told.code, told.help) == ("E014", "give the delta directory: --set second=DIR")
    told = refused(base, out, "lora_mix", first=first, second=str(base), r="3")
    assert told.code == "E034" and "is not a delta directory" in told.message
    told = refused(model_dir("llama"), out, "lora_mix", first=first, second=first, r="3")
    assert told.code == "E035" and "is not the base that" in told.message
    told = refused(base, out, "lora_mix", first=first, second=first, r="4")
    assert told.code == "E013" and "is [3, 32], and [4, 32] is wanted" in told.message
    assert told.span is not None and told.span.file.endswith("lora_mix.yaml")
    told = refused(base, out, "lora_mix", first=first, second=str(adapters[0]), r="3")
    assert told.code == "E040" and "has no row `lora`; its rule is `pfeiffer`" in told.message


def test_a_missing_tensor_and_a_missing_parameter_are_told(
    model_dir: Callable[[str], Path], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    row = "{{at: attention, modify: {taps}, form: 'linear(linear(x, A), B)', params: {{A: {{shape: [r, d_in], init: "
    row += "'load(d, lora.{name})'}}, B: {{shape: [d_out, r], init: zeros}}}}}}"
    head = "peftc: 1\nname: t\nhyper: {r: 3, d: unset}\ndeltas:\n  a: "
    file, base = tmp_path / "rule.yaml", model_dir("bert-base")
    file.write_text(head + row.format(taps="k", name="A") + "\n")
    told = refused(base, tmp_path / "out", str(file), d=str(loras[0]))
    assert told.code == "E040" and "lora.k.A: its row `lora` does not reach this site" in told.message
    file.write_text(head + row.format(taps="q", name="C") + "\n")
    told = refused(base, tmp_path / "out", str(file), d=str(loras[0]))
    assert told.code == "E040" and "row `lora` of" in told.message and "has no parameter `C`" in told.message


def test_load_without_a_name_continues_the_same_row(
    model_dir: Callable[[str], Path], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(
        "peftc: 1\nname: t\nhyper: {r: 3, d: unset}\ndeltas:\n  lora: {at: attention, modify: q, form: "
        "'linear(linear(x, A), B)', params: {A: {shape: [r, d_in], init: load(d)}, B: {shape: [d_out, r], init: "
        "2 * load(d)}}}\n"
    )
    model = peftc.apply(file, model_dir("bert-base"), set={"d": loras[0]})
    then = peftc.load(loras[0]).encoder.layer[0].attention.peftc.lora.q
    now = model.encoder.layer[0].attention.peftc.lora
    assert torch.equal(now.A, then.A)
    assert torch.equal(now.B, 2 * then.B)


def test_no_rule_can_say_itself_which_directory_is_read(loras: tuple[Path, Path]) -> None:
    """A path that stands in a rule, as its default too, is never opened; nor is one left in a resolved rule."""
    resolved = load_rule("lora_mix", {"first": str(loras[0]), "second": str(loras[1])})
    assert resolved.deltas[0].places == {"first": str(loras[0]), "second": str(loras[1])}
    assert parse_rule(resolved.text, "rule.yaml").deltas[0].places == {"first": None, "second": None}


def test_plan_and_check_need_no_stored_delta(model_dir: Callable[[str], Path]) -> None:
    report = driver.plan("adapter_fusion", model_dir("bert-base"), {"r": 5})
    assert report.plan.trained_count == 2 * 3 * 32 * 32
