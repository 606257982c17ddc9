"""`peftc check --model`: what only a model can tell, at the line of the row."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftc.checking.check import check
from peftc.diagnostics import Diagnostic, PeftcError

HEAD = "peftc: 1\nname: t\nhyper: {r: 4}\ndeltas:\n"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny BERT."""
    from transformers import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=99, **sizes)).save_pretrained(directory)
    return directory


def told(rows: str, bert: Path, tmp_path: Path) -> list[Diagnostic]:
    file = tmp_path / "t.yaml"
    file.write_text(HEAD + rows, encoding="utf-8")
    (checked,) = check([str(file)], model=bert).files
    return list(checked.diagnostics)


def test_notes_say_what_does_not_fold_and_what_starts_elsewhere(bert: Path, tmp_path: Path) -> None:
    rows = (
        "  folds: {at: attention, modify: [q, v], form: low_rank}\n"
        "  widens: {at: ffn, modify: out, form: bottleneck, with: {f: gelu}, where: {layers: [0]}}\n"
        "  stays: {at: ffn, modify: out, form: bottleneck, with: {f: relu}, where: {layers: [1]}}\n"
        "  moves: {at: attention, modify: out, form: v, params: {v: {shape: [d_out], init: ones}}}\n"
    ).replace("form: v,", 'form: "1 * v",')
    found = told(rows, bert, tmp_path)
    assert {d.severity for d in found} == {"note"}
    assert [(d.code, d.span.line if d.span else 0) for d in found] == [("W011", 7), ("W012", 8)]
    assert "delta `stays` does not fold into weights (1 site): `relu` is not affine" in found[0].message
    assert "in `f(linear(u, W_down, b_down))` of form `bottleneck`" in found[0].message
    assert found[1].message == "delta `moves` is not zero at its initial values (2 sites)"


@pytest.mark.parametrize(
    ("form", "reason", "token"),
    [
        ('"linear(linear(x, A), A.T) * sigmoid(x)"', "`sigmoid` is not affine", "sigmoid(x)"),
        ('"linear(linear(x, A) * linear(x, A), A.T)"', "`mul` is not affine", "linear(x, A) * linear(x, A)"),
        ('"linear(relu(linear(x, A)), A.T) + norm(h) * x"', "is not affine", ""),
        ('"linear(softmax(linear(x, A)), A.T)"', "`softmax` is not affine", "softmax(linear(x, A))"),
        (
            '"linear(cumsum(linear(x, A), dim=1), A.T)"',
            "`cumsum` is not an affine function of each token",
            "cumsum(linear(x, A), dim=1)",
        ),
    ],
)
def test_what_hinders_a_fold_is_told_at_its_call(
    form: str, reason: str, token: str, bert: Path, tmp_path: Path
) -> None:
    row = f"  a: {{at: attention, modify: out, form: {form}, params: {{A: {{shape: [r, d_in], init: zeros}}}}}}\n"
    (found,) = [d for d in told(row, bert, tmp_path) if d.code == "W011"]
    assert found.span is not None
    assert reason in found.message
    assert found.span.text[found.span.col - 1 : found.span.end_col - 1].startswith(token)


def test_row_that_matches_nothing_is_told_at_the_condition(bert: Path, tmp_path: Path) -> None:
    (found,) = told("  a: {at: ffn, modify: out, form: bottleneck, where: {layers: [7]}}\n", bert, tmp_path)
    assert (found.code, str(found.span)) == ("E020", f"{tmp_path / 't.yaml'}:5:63")


def test_parameter_without_gradient_is_told_at_its_row(bert: Path, tmp_path: Path) -> None:
    row = "  a: {at: ffn, modify: out, form: r * sign(v) * x, params: {v: {shape: [d_in], init: ones}}}\n"
    (found,) = told(row, bert, tmp_path)
    assert (found.code, found.span.line if found.span else 0) == ("E024", 5)


def test_wrong_model_is_told_once_for_all_rules(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="E030"):
        check(["mam", "lora"], model=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("row", "message", "help"),
    [
        (
            '{at: ffn, modify: out, form: "linear(x, W)", params: {W: {shape: [d_out, 48], init: zeros}}}',
            "`linear(x, W)` does not fit at ffn bert.encoder.layer.0: x is [B, S, d_in=32] but W is [d_out=32, 48]",
            "transpose it? `linear` takes [out, in], so `W.T` fits",
        ),
        (
            '{at: linear, modify: weight, form: "h.T", where: {role: up}}',
            "`h + dh` does not fit at linear bert.encoder.layer.0.intermediate.dense: "
            "h is [d_out=64, d_in=32] but dh is [d_in=32, d_out=64]",
            "counted from the last, axes must be equal, or 1",
        ),
        (
            '{at: attention, modify: out, form: "reshape(x, [-1, 7])"}',
            "`reshape(x, [-1, 7])` does not fit at self attention bert.encoder.layer.0.attention: x is [B, S, d_in=32]",
            "shape '[-1, 7]' is invalid for input of size",
        ),
        (
            '{at: ffn, modify: out, form: "linear(x, W)", compose: dh, params: {W: {shape: [2 * 8, d_in], init: 0}}}',
            "delta `a` at ffn bert.encoder.layer.0: the new value is [B, S, 16], but `out` is [B, S, d_out=32]",
            "dh is [B, S, 16]; it must broadcast to h",
        ),
    ],
)
def test_sizes_are_told_with_names_and_numbers(row: str, message: str, help: str, bert: Path, tmp_path: Path) -> None:
    (found,) = [d for d in told(f"  a: {row}\n", bert, tmp_path) if d.severity == "error"]
    assert (found.code, found.message) == ("E013", message)
    assert found.help is not None
    assert found.help.startswith(help)
