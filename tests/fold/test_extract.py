"""`peftc extract` reads a low-rank delta off two checkpoints: the truncated SVD of every change, and the rest whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from badinput.command import refused, run

import peftc
from fold.conftest import Checkpoints
from fold.support import adapt, load_plain, merge, outputs, tiny
from peftc import driver
from peftc.merging import extract, lowrank
from peftc.runtime.delta_dir import TENSORS, DeltaDir
from peftc.store.model_dir import ModelDir
from peftc.store.safetensors_io import read_header, read_tensor

LORA: dict[str, Any] = {"r": 2, "alpha": 4.0}


def matrix(dense: torch.Tensor, step: int = 7) -> lowrank.Matrix:
    def blocks() -> Any:
        return ((first, dense[first : first + step]) for first in range(0, len(dense), step))

    return lowrank.Matrix((dense.shape[0], dense.shape[1]), blocks)


def decaying(rows: int, columns: int, rate: float) -> torch.Tensor:
    """A matrix whose singular values fall by `rate` from one to the next."""
    generator = torch.Generator().manual_seed(0)
    small = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64)).Q for n in (rows, columns))
    return (u * rate ** torch.arange(small, dtype=torch.float64)) @ v.t()


@pytest.mark.parametrize("sketched", [False, True])
def test_the_low_rank_part_is_the_truncated_svd(sketched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "EXACT", 0 if sketched else 1 << 21)
    dense = decaying(60, 90, 0.7)
    found = lowrank.decompose(matrix(dense), 5)
    u, s, vt = np.linalg.svd(dense.numpy(), full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    assert found.exact != sketched
    assert np.abs((found.left @ found.right).numpy() - best).max() < (1e-6 if sketched else 1e-12)
    for kept in range(6):
        expected = np.sqrt((s[kept:] ** 2).sum()) / np.linalg.norm(dense.numpy())
        assert found.error(kept) == pytest.approx(expected, rel=1e-6)
    assert matrix(dense).error(found.left, found.right) == pytest.approx(np.linalg.norm(dense.numpy() - best), rel=1e-6)


@pytest.mark.parametrize("sketched", [False, True])
def test_the_least_rank_within_an_error_is_found(sketched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "EXACT", 0 if sketched else 1 << 21)
    monkeypatch.setattr(lowrank, "_FIRST", 2)
    dense = decaying(60, 90, 0.7)
    values = 0.7 ** np.arange(60)
    missed = np.array([np.sqrt((values[kept:] ** 2).sum() / (values**2).sum()) for kept in range(60)])
    found = lowrank.decompose_within(matrix(dense), 0.05, 40)
    assert found is not None and found.rank == int(np.argmax(missed <= 0.05))
    assert lowrank.decompose_within(matrix(dense), 0.05, found.rank - 1) is None


FAMILIES = {"bert": "lora", "gpt2": "lora_linear", "phi3": "lora_linear", "albert": "lora_linear"}


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "bert")]
)
def test_a_known_lora_is_found_again_and_merges_into_the_tuned_model(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoint(family, torch.float32)
    adapt(FAMILIES[family], base, set=LORA).save_pretrained(tmp_path / "delta")
    driver.merge(tmp_path / "delta", tmp_path / "tuned", outputs=False)
    report = driver.extract(base, tmp_path / "tuned", tmp_path / "again", rank=6 if family == "gpt2" else 2)
    assert report.tensors and not report.whole and not report.dropped
    assert all(entry.error < 1e-5 for entry in report.tensors)
    driver.merge(tmp_path / "again", tmp_path / "merged", outputs=False)
    before, tuned, after = (ModelDir.open(place) for place in (base, tmp_path / "tuned", tmp_path / "merged"))
    changed = {entry.name for entry in report.tensors}
    for name in tuned.tensors:
        assert torch.allclose(after.read(name), tuned.read(name), rtol=0, atol=2e-6), name
        assert torch.equal(before.read(name), tuned.read(name)) == (name not in changed)
    assert json.loads((tmp_path / "again" / "extraction.json").read_text()) == report.to_json()


def test_the_product_of_a_known_lora_comes_back(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = merge("lora", checkpoint("bert", torch.float32), tmp_path, set=LORA)
    driver.extract(found.base, found.out, tmp_path / "again", rank=2)
    ours, theirs = read_header(tmp_path / "again" / TENSORS), found.adapted.state_dict()
    for layer in range(2):
        for tap, module in (("q", "query"), ("v", "value")):
            a, b = (theirs[f"encoder.layer.{layer}.attention.peftc.lora.{tap}.{part}"] for part in "AB")
            own = f"encoder.layer.{layer}.attention.self.{module}.peftc.r2"
            product = read_tensor(ours, f"{own}.B") @ read_tensor(ours, f"{own}.A")
            assert torch.allclose(product, 2.0 * (b @ a), rtol=0, atol=1e-6)


def tuned_whole(base: Path, place: Path, only: str = "") -> Path:
    """A copy of which every parameter (whose name has `only` in it) has moved."""
    model = load_plain(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.save_pretrained(place)
    return place


def test_what_is_no_weight_of_a_linear_layer_is_kept_whole(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert", torch.float64)
    tuned = tuned_whole(base, tmp_path / "tuned")
    report = driver.extract(base, tuned, tmp_path / "delta", rank=4)
    assert {entry.rank for entry in report.tensors} == {4}
    assert "embeddings.word_embeddings.weight" in report.whole and "pooler.dense.bias" in report.whole
    driver.merge(tmp_path / "delta", tmp_path / "merged", outputs=False)
    before, after, merged = (ModelDir.open(place) for place in (base, tuned, tmp_path / "merged"))
    for name in report.whole:
        assert torch.equal(merged.read(name), after.read(name)), name
    for entry in report.tensors:
        change = (after.read(entry.name) - before.read(entry.name)).numpy()
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        expected = before.read(entry.name).numpy() + (u[:, :4] * s[:4]) @ vt[:4]
        assert np.abs(merged.read(entry.name).numpy() - expected).max() < 1e-6
        assert entry.error == pytest.approx(np.sqrt((s[4:] ** 2).sum() / (s**2).sum()), rel=1e-5)
    (rank, share, worst) = report.curve[-1]
    assert rank == 4 and share == pytest.approx(report.error, rel=1e-4) and worst >= share
    adapted = peftc.load(tmp_path / "delta")
    for one, other in zip(outputs(adapted), outputs(load_plain(tmp_path / "merged")), strict=True):
        assert float((one - other).abs().max()) < 1e-5
    dropped = driver.extract(base, tuned, tmp_path / "dropped", rank=4, drop_others=True)
    assert not dropped.whole and set(report.whole) <= set(dropped.dropped)


def test_a_share_to_be_missed_chooses_the_rank_of_each_weight(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert", torch.float32)
    report = driver.extract(base, tuned_whole(base, tmp_path / "tuned", "query"), tmp_path / "delta", error=0.6)
    assert len(report.tensors) == 2
    for entry in report.tensors:
        assert entry.error <= 0.6 < np.sqrt(1 - (np.array(entry.values[: entry.rank - 1]) ** 2).sum() / entry.change**2)
    everything = driver.extract(base, tmp_path / "tuned", tmp_path / "whole", error=1e-9)
    assert not everything.tensors, "two factors would be larger than the weight"
    assert sum(name.endswith("query.weight") for name in everything.whole) == 2


@pytest.mark.slow
def test_a_new_head_comes_along(tmp_path: Path, checkpoint: Checkpoints) -> None:
    import transformers

    base = checkpoint("bert", torch.float32)
    tuned = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        tuned.bert.encoder.layer[0].output.dense.weight.add_(0.1 * torch.ones(16, 24))
    tuned.save_pretrained(tmp_path / "tuned")
    report = driver.extract(base, tmp_path / "tuned", tmp_path / "delta", rank=1)
    assert report.whole == ["classifier.weight", "classifier.bias"]
    driver.merge(tmp_path / "delta", tmp_path / "merged")
    merged = load_plain(tmp_path / "merged")
    assert type(merged) is type(tuned)
    for one, other in zip(outputs(merged), outputs(tuned), strict=True):
        assert float((one - other).abs().max()) < 1e-5


@pytest.mark.slow
def test_tied_weights_are_kept_whole_and_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert_mlm", torch.float64)
    tuned = tuned_whole(base, tmp_path / "tuned")
    report = driver.extract(base, tuned, tmp_path / "delta", rank=4)
    assert sum("word_embeddings" in name or "decoder.weight" in name for name in report.whole) == 1
    driver.merge(tmp_path / "delta", tmp_path / "merged", outputs=False)
    after, merged = ModelDir.open(tuned), ModelDir.open(tmp_path / "merged")
    assert all(torch.equal(after.read(name), merged.read(name)) for name in after.tensors if "word_emb" in name)


def test_one_glob_stands_for_all_layers_and_never_for_one_more() -> None:
    names = [f"a.{layer}.q[x]" for layer in range(3)] + ["a.0.k", "a.1.k"]
    assert extract.globs(names[:3], names) == ["a.*.q[[]x]"]
    assert extract.globs([names[0], names[2], "a.0.k", "a.1.k"], names) == ["a.0.q[[]x]", "a.2.q[[]x]", "a.*.k"]


def test_a_rule_for_many_layers_of_many_ranks_is_read(tmp_path: Path) -> None:
    from peftc.lang.loader import parse_rule

    sites = [f"model.layers.{layer}.mlp.{name}" for layer in range(126) for name in ("up", "gate", "down")]
    sites += [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(126) for name in "qkvo"]
    text = extract.rule_text({path: 1 + index % 40 for index, path in enumerate(sites[1:])}, sites[:1], sites, sites)
    assert len(parse_rule(text, "extracted.yaml").deltas) == 40


def test_what_cannot_be_extracted_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("bert", torch.float32)
    place = tmp_path / "delta"
    assert "nothing changed" in refused("E066", "extract", base, base, "-o", place)
    assert "a gpt2 model" in refused("E066", "extract", base, checkpoint("gpt2", torch.float32), "-o", place)
    import transformers

    longer = tiny("bert")
    longer.resize_token_embeddings(70)
    assert isinstance(longer, transformers.BertModel)
    longer.save_pretrained(tmp_path / "longer")
    assert "as [70, 16]" in refused("E066", "extract", base, tmp_path / "longer", "-o", place)
    assert "no share" in refused("E014", "extract", base, base, "--error", "2", "-o", place)
    assert not place.exists()


@pytest.mark.slow
def test_the_command_prints_the_error_by_rank(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from peftc.cli import app

    base = checkpoint("bert", torch.float32)
    tuned = tuned_whole(base, tmp_path / "tuned", "query.weight")
    told = CliRunner().invoke(app, ["extract", str(base), str(tuned), "--rank", "4", "-o", str(tmp_path / "delta")])
    assert told.exit_code == 0, told.output
    assert "of all changes" in told.stdout and "█" in told.stdout and "peftc merge" in told.stdout
    assert run("merge", tmp_path / "delta", "-o", tmp_path / "merged", "--certify", "tensors", "-q").code == 0
    assert DeltaDir.open(tmp_path / "delta").rule.name == "extracted"
