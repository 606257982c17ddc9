"""The family table: small configs, counts by class names, and the table that is shipped. The sweep itself is slow."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from typer.testing import CliRunner

from peftc.cli import app
from peftc.survey.causes import cause
from peftc.survey.measure import measure
from peftc.survey.record import Record
from peftc.survey.shrink import Attempt, attempts, default_config, shrink
from peftc.survey.sweep import FEW, every_family, sweep
from peftc.survey.table import table
from peftc.survey.totals import Part, lines, sums, totals
from peftc.survey.trial import fitting_shapes, markers


def test_a_config_is_cut_to_the_first_layer_of_each_type() -> None:
    raw = {
        "model_type": "any",
        "num_hidden_layers": 6,
        "hidden_size": 4096,
        "layer_types": ["a", "a", "b", "a", "a", "b"],
    }
    small = shrink(raw)
    assert small["layer_types"] == ["a", "b"]
    assert (small["num_hidden_layers"], small["hidden_size"]) == (2, 64)


def test_a_config_inside_a_config_is_made_small_too() -> None:
    small = shrink(default_config("llava"))
    assert small["text_config"]["num_hidden_layers"] == small["vision_config"]["num_hidden_layers"] == 2
    assert small["text_config"]["vocab_size"] > small["image_token_index"]


def test_fields_that_a_failure_names_get_their_defaults_back() -> None:
    tried: list[Attempt] = []
    for attempt in attempts({"model_type": "any", "hidden_size": 4096, "num_hidden_layers": 32}):
        tried.append(attempt)
        attempt.error = ValueError("hidden_size must be 4096") if len(tried) == 1 else ValueError("no field")
    assert [a.config["hidden_size"] for a in tried[:2]] == [64, 4096]
    assert all(a.config["num_hidden_layers"] == 2 for a in tried)


def test_the_shipped_table_has_a_reason_for_every_miss() -> None:
    records = table().records
    assert set(records) <= set(every_family())
    for record in records.values():
        right = record.traced and record.right("attention") and record.right("ffn")
        assert right or record.reasons, record.family


def test_families_prints_the_table_and_its_sums() -> None:
    shown = CliRunner().invoke(app, ["families", "--json"])
    assert len(json.loads(shown.stdout)["families"]) == len(table().records)
    text = CliRunner().invoke(app, ["families"]).stdout
    assert all(line in text for line in lines(totals(table().records.values())))


def _row(**changes: object) -> Record:
    both = {"attention": 2, "ffn": 2}
    given = {"built": True, "traced": True, "expected": both, "found": both, "full": True, "rules": {"mam": "onnx"}}
    return Record("any", **{**given, **changes})  # pyright: ignore[reportArgumentType]


def test_the_aim_counts_families_with_both_kinds_that_are_right_and_equal_in_onnx() -> None:
    rows = [
        _row(),
        _row(found={"attention": 1, "ffn": 2}, reasons=["attention: 1 of 2 found"]),
        _row(rules={"mam": "learns"}, reasons=["mam after `learns`: ConversionError: no such op"]),
        _row(expected={"attention": 2, "ffn": 0}, found={"attention": 2, "ffn": 0}),
        _row(full=False, rules={}),
        _row(traced=False, reasons=["does not build: ImportError: X requires the timm library"]),
    ]
    found = totals(rows)
    assert found.aim == Part(1, 3)
    assert found.sites == {"attention": Part(4, 5), "ffn": Part(4, 4), "both": Part(3, 4)}
    assert found.rules["mam"] == {
        "applies": Part(3, 3), "identity": Part(3, 3), "learns": Part(3, 3), "onnx": Part(2, 3),
    }  # fmt: skip
    assert found.causes["needs a package that is not installed"] == 1
    assert any("1 of 3 (33.3%); the aim is 90%" in line for line in lines(found))


def test_the_readme_states_what_the_table_says() -> None:
    stated = "\n".join(sums(totals(table().records.values())))
    assert stated in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_every_reason_of_the_shipped_table_has_a_cause_in_words() -> None:
    reasons = {reason for record in table().records.values() for reason in record.reasons}
    assert [reason for reason in reasons if cause(reason) == "another reason"] == []


def test_an_unknown_model_type_is_told_with_the_nearest() -> None:
    result = CliRunner().invoke(app, ["families", "lama"])
    assert result.exit_code == 2
    assert "E032" in result.stderr and "did you mean `llama`?" in result.stderr


def test_sizes_that_a_trace_fixes_are_kept_and_the_others_vary() -> None:
    program = SimpleNamespace(fixed={"sequence": 11}, guards=None)
    shapes, held = fitting_shapes(program)  # pyright: ignore[reportArgumentType]
    assert held == {"sequence": 11}
    assert [(s["batch"], s["sequence"], s["target"]) for s in shapes] == [(3, 11, 4), (2, 11, 9)]


def test_tokens_that_stand_for_no_text_are_read_from_the_config() -> None:
    config = SimpleNamespace(image_token_id=21, audio_token_index=20, video_token_id=None, eos_token_id=2)
    assert markers(config) == [20, 21]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["canine", "higgs_audio_v2", "phimoe", "nemotron_asr_streaming"])
def test_mam_gets_to_onnx_where_one_length_markers_noise_or_masks_stood_in_the_way(family: str) -> None:
    assert measure(family, onnx=True).rules["mam"] == "onnx"


@pytest.mark.slow
def test_families_of_the_tests_are_right_up_to_onnx_behind_the_warm_server() -> None:
    names = ["bert", "llama", "t5", "gpt2"]
    assert len(names) > FEW
    for record in sweep(names, seconds=300, onnx=True):
        assert record.reasons == [], record.family
        assert record.rules == {"mam": "onnx", "lora": "learns", "houlsby": "learns"}


@pytest.mark.slow
def test_a_family_that_takes_too_long_ends_alone() -> None:
    slow, right = sweep(["llama"], seconds=0), sweep(["bert"], seconds=300, numbers=False)
    assert next(slow).reasons == ["not done after 0 s"]
    assert next(right).traced


@pytest.mark.slow
def test_a_sample_measured_anew_has_the_sites_of_the_shipped_table() -> None:
    """A sample that differs with the version of transformers, so that in time every family has its turn."""
    shipped = {name: record for name, record in table().records.items() if record.traced}
    sample = random.Random(transformers.__version__).sample(sorted(shipped), 12)
    for record in sweep(sample, seconds=180, numbers=False):
        for kind in ("attention", "ffn"):
            assert record.right(kind) or not shipped[record.family].right(kind), (record.family, record.reasons)


@pytest.mark.survey
@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_sites_are_right_on_nine_in_ten_families(kind: str) -> None:
    """Every family measured anew; a table of hours ago would hide what a change of a finder broke."""
    records = _everything()
    having = [r for r in records if r.traced and r.expected[kind]]
    missed = [f"{r.family}: {'; '.join(r.reasons)}" for r in having if not r.right(kind)]
    print("\n".join(missed))
    assert len(missed) <= len(having) / 10, f"{len(missed)} of {len(having)} missed"


_MEASURED: list[Record] = []


def _everything() -> list[Record]:
    if not _MEASURED:
        _MEASURED.extend(sweep(every_family(), seconds=180, numbers=False))
    return _MEASURED
