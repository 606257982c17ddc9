"""`peftc merge --export pt2`: an archive of the folded model that torch alone reads; and compiled ahead of time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import peftc
from fold.conftest import Checkpoints
from peftc import driver
from peftc.cli import app
from peftc.diagnostics import PeftcError


def adapted(checkpoint: Checkpoints, family: str, rule: str, directory: Path, **hyper: object) -> Path:
    model = peftc.apply(rule, checkpoint(family, torch.float32), set=hyper)
    with torch.no_grad():
        for name in model.surgery.plan.parameters:
            model.get_parameter(name).add_(0.2 * torch.randn(model.get_parameter(name).shape))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "rule", "hyper"),
    [("gpt2", "lora", {"r": 4}), pytest.param("bert", "mam", {"r": 4, "l": 3}, marks=pytest.mark.slow)],
)
def test_the_archive_answers_as_the_unfolded_model_at_other_sizes(
    checkpoint: Checkpoints, tmp_path: Path, family: str, rule: str, hyper: dict[str, object]
) -> None:
    delta = adapted(checkpoint, family, rule, tmp_path / "delta", **hyper)
    driver.merge(delta, tmp_path / "out", export={"pt2"})
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"model.pt2", "config.json", "certificate.json"}
    archive, model = torch.export.load(tmp_path / "out" / "model.pt2").module(), peftc.load(delta)
    for rows, length in ((1, 5), (4, 17)):
        inputs = {"input_ids": torch.randint(3, 60, (rows, length)), "attention_mask": torch.ones(rows, length).long()}
        more = {"position_ids": torch.arange(length).expand(rows, -1)} if family == "gpt2" else {}
        with torch.no_grad():
            found, wanted = archive(**inputs, **more), model(**inputs, **more)
        assert type(found) is dict
        for name, value in found.items():
            assert torch.allclose(value, wanted[name], atol=1e-5), name
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert any(c["what"] == "model.pt2" and c["holds"] for c in certificate["comparisons"])
    assert driver.verify(tmp_path / "out").files == 1


@pytest.mark.slow
def test_the_archive_is_read_without_transformers_and_peftc(checkpoint: Checkpoints, tmp_path: Path) -> None:
    delta = adapted(checkpoint, "bert", "lora", tmp_path / "delta", r=4)
    driver.merge(delta, tmp_path / "out", export={"pt2"})
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peftc'] = None\n"
        "import torch; m = torch.export.load(sys.argv[1]).module(); i = torch.ones(2, 9, dtype=torch.long)\n"
        "print(sorted(m(input_ids=i, attention_mask=i)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out" / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['last_hidden_state', 'pooler_output']\n"


@pytest.mark.slow
def test_the_package_compiled_ahead_answers_as_the_unfolded_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    delta = adapted(checkpoint, "bert", "mam", tmp_path / "delta", r=4, l=3)
    report = driver.merge(delta, tmp_path / "out", export={"aoti"})
    assert not (tmp_path / "out" / "model.pt2").exists()
    assert [c.what for c in report.comparisons] == ["model.aoti.pt2"] * 3
    assert max(c.absolute for c in report.comparisons) < 1e-5


def test_without_a_compiler_it_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "none")
    with pytest.raises(PeftcError, match=r"E094.*CXX names `none`"):
        driver.merge(tmp_path, tmp_path / "out", export={"aoti"})
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["merge", str(tmp_path), "--export", "aoti"])
    assert result.exit_code == 2 and "no g++ or clang++" in result.output
