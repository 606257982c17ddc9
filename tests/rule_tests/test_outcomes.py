"""What `peftc test` says of right and of wrong expectations, each on a rule whose numbers are counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftc.checking.families import traced
from peftc.checking.rule_tests import Result, run_tests
from peftc.lang.loader import load_rule

LORA = """peftc: 1
name: mine
hyper:
  r: {default: 8, min: 1}
deltas:
  low: {at: attention, modify: [q, v], insert: parallel, form: low_rank, compose: h + dh}
tests:
  case: {family: FAMILY, hyper: {r: 4}, EXPECTED}
"""
# On a BERT of width 32 and two layers: 2 layers * 2 taps * r * (32 + 32) parameters.


def results(tmp_path: Path, text: str) -> list[Result]:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return list(run_tests(load_rule(file), str(file)))


def only(tmp_path: Path, expected: str, family: str = "encoder", text: str = LORA) -> Result:
    (result,) = results(tmp_path, text.replace("FAMILY", family).replace("EXPECTED", expected))
    return result


@pytest.mark.parametrize(
    "expected",
    [
        "sites: 2",
        "sites: {low: 2}",
        "sites: [2]",
        "trained: 1024",
        "trained: 2 * 2 * r * (32 + 32)",
        "identity: true",
        "fold: merged",
        "fold: {low: merged}",
        "not: {role: [k, o, up, down]}",
        "not: {role: other}",
        "same_as: {rule: lora, hyper: {r: 4, alpha: 4.0}, map: {low: lora}}",
    ],
)
def test_what_holds_is_validated(tmp_path: Path, expected: str) -> None:
    result = only(tmp_path, expected)
    assert (result.outcome, result.findings) == ("validated", ())


@pytest.mark.parametrize(
    ("expected", "outcome", "key", "found"),
    [
        ("sites: 1", "noisy", "sites.low", "2 sites"),
        ("sites: {low: 3}", "missing", "sites.low", "2 sites"),
        ("trained: 1000", "noisy", "trained", "1,024 (low 1,024)"),
        ("trained: 1025", "missing", "trained", "1,024 (low 1,024)"),
        ("identity: false", "missing", "identity", "they differ by 0.00e+00"),
        ("fold: kept", "missing", "fold.low", "merged at 4 of 4 sites"),
        ("not: {role: [k, v]}", "noisy", "not", "row `low` changes `v` of linear encoder.layer.0.attention.self.value"),
        ("not: {layers: last 1}", "noisy", "not", "row `low` changes `q` of linear encoder.layer.1"),
        ("not: {path: no.such.module}", "missing", "not", "the model has no such site"),
        ("same_as: {rule: lora, hyper: {r: 4}, map: {low: lora}}", "missing", "same_as", "they differ by "),
        ("same_as: {rule: lora, hyper: {r: 5}, map: {low: lora}}", "missing", "same_as", "is [4, 32], and "),
        ("same_as: {rule: rslora, map: {A: W_down}}", "missing", "same_as", "has no counterpart"),
        ("same_as: bitfit", "missing", "same_as", "has no counterpart"),
        ("error: E020", "missing", "error", "the rule applies"),
    ],
)
def test_what_does_not_hold_is_told_with_its_place(
    tmp_path: Path, expected: str, outcome: str, key: str, found: str
) -> None:
    result = only(tmp_path, expected)
    assert result.outcome == outcome
    (finding,) = result.findings
    assert (finding.key, finding.span.line) == (key, 8)
    assert found in finding.found
    told = finding.span.text[finding.span.col - 1 : finding.span.end_col - 1]
    assert told == expected.partition(": ")[2].removeprefix("{low: ").removesuffix("}" if "." in key else "")


def test_llama_with_grouped_values_is_counted_by_its_own_sizes(tmp_path: Path) -> None:
    counts = "trained: [2 * 2 * r * 64, 2 * r * (32 + 32 + 32 + 16), 6 * 2 * r * 64], sites: [2, 2, 6]"
    text = LORA.replace("FAMILY", "[encoder, decoder, encoder-decoder]").replace("EXPECTED", counts)
    assert [result.outcome for result in results(tmp_path, text)] == ["validated"] * 3


def test_value_of_one_family_is_told_at_its_item(tmp_path: Path) -> None:
    text = LORA.replace("FAMILY", "[encoder, decoder]").replace("EXPECTED", "sites: [2, 4]")
    right, wrong = results(tmp_path, text)
    (finding,) = wrong.findings
    assert (right.outcome, wrong.outcome, wrong.case) == ("validated", "missing", "case[decoder]")
    assert finding.span.text[finding.span.col - 1 : finding.span.end_col - 1] == "4"


ROWS = """peftc: 1
name: mine
deltas:
  a: ROW
tests:
  case: {family: FAMILY, EXPECTED}
"""


def row(tmp_path: Path, row: str, expected: str, family: str = "encoder") -> Result:
    return only(tmp_path, expected, family, ROWS.replace("ROW", row))


SHARED = """peftc: 1
name: mine
hyper: {r: 4}
rewrite:
  pair:
    at: attention
    params:
      A: {shape: [r, d_in], init: kaiming_uniform}
      B: {shape: [d_out, r], init: zeros}
      C: {shape: [d_out, r], init: zeros}
    let: {z: "linear(x, A)"}
    set: {q: "q + linear(z, B)", v: "v + linear(z, C)"}
tests:
  case: {family: FAMILY, EXPECTED}
"""
# On a BERT of width 32 and two layers: 2 layers * 3 tensors * r * 32 parameters.


@pytest.mark.parametrize(
    "expected",
    [
        "sites: {pair: 2}",
        "trained: 2 * 3 * r * 32",
        "identity: true",
        "fold: {pair: merged}",
        "not: {role: [k, o, up, down]}",
    ],
)
def test_what_holds_of_an_entry_of_rewrite_is_validated(tmp_path: Path, expected: str) -> None:
    result = only(tmp_path, expected, text=SHARED)
    assert (result.outcome, result.findings) == ("validated", ())


@pytest.mark.parametrize(
    ("expected", "outcome", "key", "found"),
    [
        ("sites: 3", "missing", "sites.pair", "2 sites"),
        ("trained: 700", "noisy", "trained", "768 (pair 768)"),
        ("identity: false", "missing", "identity", "they differ by 0.00e+00"),
        ("fold: kept", "missing", "fold.pair", "merged at 4 of 4 sites"),
        ("not: {role: q}", "noisy", "not", "row `pair` changes `q` of linear encoder.layer.0.attention.self.query"),
        ("not: {role: v}", "noisy", "not", "row `pair` changes `v` of linear encoder.layer.0.attention.self.value"),
    ],
)
def test_what_does_not_hold_of_an_entry_of_rewrite_is_told(
    tmp_path: Path, expected: str, outcome: str, key: str, found: str
) -> None:
    result = only(tmp_path, expected, text=SHARED)
    (finding,) = result.findings
    assert (result.outcome, finding.key) == (outcome, key)
    assert found in finding.found


def test_an_entry_that_skips_a_block_is_kept_and_no_identity(tmp_path: Path) -> None:
    text = ROWS.replace("deltas:\n  a: ROW", "rewrite:\n  skip: {at: block, where: {layers: [-1]}, set: {out: x}}")
    for family in ("encoder", "decoder"):
        assert only(tmp_path, "sites: 1, trained: 0, identity: false", family, text).outcome == "validated"
        assert only(tmp_path, "identity: true", family, text).outcome == "missing"


def test_refused_rule_is_what_an_error_case_expects(tmp_path: Path) -> None:
    cross = "{at: attention, where: {kind: cross}, modify: out, insert: sequential, form: vector}"
    assert row(tmp_path, cross, "error: E020").outcome == "validated"
    assert row(tmp_path, cross, "error: E020", "encoder-decoder").outcome == "missing"
    assert row(tmp_path, cross, "error: E021").outcome == "failed"


def test_row_that_matches_nothing_is_missing_and_any_other_refusal_is_failed(tmp_path: Path) -> None:
    cross = "{at: attention, where: {kind: cross}, modify: out, insert: sequential, form: vector}"
    missing = row(tmp_path, cross, "sites: 2")
    assert (missing.outcome, missing.findings[0].found[:5]) == ("missing", "E020:")
    wrong = "{at: ffn, modify: out, form: 'linear(x, W)', params: {W: {shape: [d_in, 3], init: zeros}}}"
    failed = row(tmp_path, wrong, "sites: 2")
    assert (failed.outcome, failed.findings[0].found[:5]) == ("failed", "E013:")


def test_deltas_that_change_nothing_cannot_pass_a_comparison(tmp_path: Path) -> None:
    idle = "{at: ffn, modify: out, form: '0 * linear(x, W)', params: {W: {shape: [d_out, d_in], init: ones}}}"
    result = row(tmp_path, idle, "fold: merged")
    assert (result.outcome, result.findings[0].found) == ("failed", "random values in them change nothing")


def test_outputs_that_are_not_finite_are_failed(tmp_path: Path) -> None:
    bad = "{at: ffn, modify: out, form: 'x / (W - W)', params: {W: {shape: [d_out], init: ones}}}"
    assert row(tmp_path, bad, "fold: merged").outcome == "failed"
    assert row(tmp_path, bad, "identity: true").outcome == "missing"


def test_widened_constant_and_kept_are_told_apart(tmp_path: Path) -> None:
    adapter = "{at: ffn, modify: out, form: bottleneck, with: {r: 3, f: FUNCTION}}"
    assert row(tmp_path, adapter.replace("FUNCTION", "gelu"), "fold: widened").outcome == "validated"
    kept = row(tmp_path, adapter.replace("FUNCTION", "relu"), "fold: widened")
    assert (kept.outcome, kept.findings[0].found[:20]) == ("missing", "kept at 2 of 2 sites")
    prefix = "{at: attention, modify: heads, form: prefix, with: {l: 3}, compose: gate}"
    assert row(tmp_path, prefix, "fold: constant", "decoder").outcome == "validated"
    assert row(tmp_path, prefix, "identity: false", "decoder").outcome == "validated"


def test_parameters_of_other_modules_are_paired_in_order(tmp_path: Path) -> None:
    linear = "{at: linear, where: {role: [q, v]}, modify: out, form: low_rank, with: {r: 8}, compose: h + 2 * dh}"
    for family in ("encoder", "decoder", "encoder-decoder"):
        assert row(tmp_path, linear, "same_as: lora", family).outcome == "validated"


def test_rule_of_another_file_is_found_beside_the_first(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(LORA.replace("FAMILY", "bert").replace("EXPECTED", "sites: 2"))
    text = LORA.replace("FAMILY", "bert").replace("EXPECTED", "same_as: {rule: other.yaml, hyper: {r: 4}}")
    assert [result.outcome for result in results(tmp_path, text)] == ["validated"]


def test_trained_parameters_of_the_base_are_nudged_and_counted(tmp_path: Path) -> None:
    head = "head: sequence-classification, trained: 2 * 32 + 2, same_as: mine.yaml"
    text = f"peftc: 1\nname: mine\ntrain: ['classifier.*']\ntests:\n  case: {{family: bert, {head}}}\n"
    assert [result.outcome for result in results(tmp_path, text)] == ["validated"]


def test_rule_without_tests_is_untested(tmp_path: Path) -> None:
    text = LORA.partition("tests:")[0]
    assert [result.outcome for result in results(tmp_path, text)] == ["untested"]


def test_rule_that_fixes_the_size_of_a_batch_spoils_no_later_test(tmp_path: Path) -> None:
    fixed = "{at: ffn, modify: out, form: 'linear(reshape(x, [3, 12, 32]), W)',"
    fixed += " params: {W: {shape: [d_out, d_in], init: zeros}}}"
    spoilt = traced("bert")
    assert row(tmp_path, fixed, "fold: kept", "bert").outcome == "failed"
    before = traced("bert")
    assert before is not spoilt
    assert only(tmp_path, "sites: 2, trained: 1024, fold: merged").outcome == "validated"
    assert traced("bert") is before  # one trace serves what binds nothing
