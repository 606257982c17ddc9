"""W013: a rule that trains nothing is told so, whatever keeps its parameters from training."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftc.checking.check import check

HEAD = "peftc: 1\nname: t\nhyper: {s: 0.5, bias: false}\n"
FROZEN = "{g: {shape: [d_out], init: ones, frozen: true}}"
GONE = "{g: {shape: [d_out], init: zeros, if: bias}}"

IDLE = {
    "a formula of numbers": ('deltas: {a: {at: ffn, modify: out, form: "s * x"}}', "no row has a parameter that"),
    "a rewrite": ("rewrite: {a: {at: block, set: {out: s * x}}}", "no row has a parameter that trains"),
    "all frozen": (
        f'deltas: {{a: {{at: ffn, modify: out, form: "g * x", params: {FROZEN}}}}}',
        "is frozen or left out",
    ),
    "all left out": (
        f'deltas: {{a: {{at: ffn, modify: out, form: "g * x if bias else s * x", params: {GONE}}}}}',
        "every parameter of its rows is frozen or left out",
    ),
}
BUSY = {
    "a form with parameters": "deltas: {a: {at: ffn, modify: out, form: vector, compose: h + s * dh}}",
    "a parameter of the base": 'train: ["*.bias"]\ndeltas: {a: {at: ffn, modify: out, form: "s * x"}}',
    "a condition that only a model decides": (
        'deltas: {a: {at: linear, modify: out, insert: sequential, form: "g * h if has_bias else s * h", '
        "params: {g: {shape: [d_out], init: zeros, if: has_bias}}}}"
    ),
    "a parameter of an entry": (
        "rewrite: {a: {at: block, params: {g: {shape: [d_model], init: ones}}, set: {out: s * g * out}}}"
    ),
}


def codes(text: str, tmp_path: Path) -> list[tuple[str, str]]:
    file = tmp_path / "t.yaml"
    file.write_text(HEAD + text + "\n", encoding="utf-8")
    (checked,) = check([str(file)]).files
    return [(d.code, d.message) for d in checked.diagnostics if d.code != "W003"]


@pytest.mark.parametrize("name", IDLE)
def test_a_rule_that_trains_nothing_is_warned_of(name: str, tmp_path: Path) -> None:
    text, reason = IDLE[name]
    ((code, message),) = codes(text, tmp_path)
    assert code == "W013" and message.startswith("`t` trains nothing: ") and reason in message


@pytest.mark.parametrize("name", BUSY)
def test_a_rule_that_may_train_is_not(name: str, tmp_path: Path) -> None:
    assert codes(BUSY[name], tmp_path) == []


def test_a_rule_that_puts_stored_deltas_together_is_not() -> None:
    assert check(["lora_mix"]).files[0].diagnostics == ()


def test_a_model_without_what_would_train_is_told(tmp_path: Path) -> None:
    """Llama's linear layers have no bias, so nothing is left of the rule."""
    from peftc.checking.families import FAMILIES

    file, model = tmp_path / "t.yaml", tmp_path / "model"
    file.write_text(HEAD + BUSY["a condition that only a model decides"] + "\n", encoding="utf-8")
    from peftc.store.heads import resolve

    cls, config = resolve(FAMILIES["llama"].raw_config(), "llama")
    cls(config).save_pretrained(model)
    (told,) = [d for d in check([str(file)], model=model).files[0].diagnostics if d.code == "W013"]
    assert told.message == "`t` trains nothing: no parameter of its rows is there in this model"
    assert told.span is not None and told.severity == "warning"
