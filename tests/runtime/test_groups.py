"""Learning rates in a rule: what an optimizer gets, what is written down, and what Trainer makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftc
from peftc import driver
from peftc.diagnostics import PeftcError
from runtime.tiny import MAKERS, batch


def test_b_learns_as_many_times_faster_as_the_rule_says(model_dir: Callable[[str], Path]) -> None:
    model = peftc.apply(
        "loraplus", model_dir("bert-base"), set={"ratio": 8}, head="sequence-classification", num_labels=3
    )
    groups = peftc.parameter_groups(model, lr=1e-3, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    for name, parameter in model.named_parameters():
        expected = 8e-3 if name.endswith(".B") else 1e-3
        decay = 0.1 if parameter.dim() > 1 else 0.0
        assert rates.get(id(parameter)) == ((expected, decay) if parameter.requires_grad else None), name
    assert {"classifier.weight", "classifier.bias"} <= {n for n, p in model.named_parameters() if p.requires_grad}


def test_rates_are_shown_by_plan_and_recorded(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    report = driver.plan("loraplus", model_dir("bert-base"))
    assert set(report.to_json()["lr"].values()) == {16.0}
    assert all(name.endswith(".B") for name in report.to_json()["lr"])
    driver.apply("loraplus", model_dir("bert-base"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "peftc.json").read_text())["lr"] == report.to_json()["lr"]
    assert driver.plan("lora", model_dir("bert-base")).to_json()["lr"] == {}
    model = peftc.load(tmp_path / "out")
    assert [group["lr"] for group in peftc.parameter_groups(model, lr=1.0)] == [1.0, 16.0]


def test_trainer_takes_the_groups_and_a_step_moves_each_by_its_rate(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """Adam's first step moves every entry by its learning rate, up to epsilon."""
    model = peftc.apply("loraplus", model_dir("bert"), set={"ratio": 4})
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in (name for name in before if name.endswith(".B")):
            model.get_parameter(name).normal_(0, 0.1)  # or A would have no gradient
            before[name].copy_(model.get_parameter(name))
    optimizer = torch.optim.AdamW(peftc.parameter_groups(model, lr=1e-3), eps=1e-30)
    rows = {**batch(4), "labels": torch.tensor([0, 1, 2, 0])}
    data = [{name: value[i] for name, value in rows.items()} for i in range(len(rows["input_ids"]))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    for name, start in before.items():
        if ".peftc." in name:
            moved = (model.get_parameter(name) - start).abs().max().item()
            assert moved == pytest.approx(4e-3 if name.endswith(".B") else 1e-3, rel=1e-3), name


def test_step_is_that_of_pefts_lora_plus(model_dir: Callable[[str], Path]) -> None:
    peft: Any = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    base = MAKERS["bert-base"]()
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"], r=8))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16)
    expected = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_role = {n.split(".")[-3]: expected[id(p)] for n, p in theirs.named_parameters() if p.requires_grad}
    model = peftc.apply("loraplus", model_dir("bert-base"))
    ours = {id(p): group["lr"] for group in peftc.parameter_groups(model, lr=2e-4) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert ours[id(parameter)] == by_role[f"lora_{name[-1]}"]


def test_a_plain_model_has_no_rates() -> None:
    with pytest.raises(PeftcError, match="BertModel has no deltas"):
        peftc.parameter_groups(MAKERS["bert-base"](), lr=1.0)


@pytest.mark.parametrize("ratio", ["-1.0", "true"])
def test_a_rate_that_is_no_rate_is_refused_at_its_place(
    ratio: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(
        f"peftc: 1\nname: t\nhyper: {{k: {ratio}}}\ndeltas:\n"
        "  a: {at: ffn, modify: out, form: v, params: {v: {shape: [d_out], init: zeros, lr: k}}}\n"
    )
    with pytest.raises(PeftcError) as caught:
        driver.plan(file, model_dir("bert-base"))
    (told,) = caught.value.diagnostics
    assert told.code == "E014"
    assert "`lr` of `v`" in told.message
    assert told.span is not None and told.span.text[told.span.col - 1 :].startswith("k}")
