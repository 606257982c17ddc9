"""Rules made to take long are refused or read in under two seconds, and told in a page."""

from __future__ import annotations

import time

import pytest

from peftc.diagnostics import MOST_SHOWN, MOST_TOLD, PeftcError, did_you_mean
from peftc.lang.loader import parse_rule

HEAD = "peftc: 1\nname: a\nhyper: {r: 4, l: 4}\ndeltas:\n"
HYPERS = "peftc: 1\nname: a\nhyper:\n" + "".join(f"  hyper_number_{i}: 1\n" for i in range(500)) + "deltas:\n"
SUM = "+".join(f"x*{i}" for i in range(38))
DEEP = "(" * 30 + "x" + "*x)" * 30


def rows(count: int, row: str) -> str:
    return "".join(f"  a{i}: {row.replace('#', str(i))}\n" for i in range(count))


def aliased_lets(expression: str) -> str:
    lets = "".join(f"      z{i}: {expression}\n" for i in range(150))
    first = f"  a:\n    at: ffn\n    modify: out\n    form: bottleneck\n    let: &l\n{lets}"
    return first + rows(60, "{at: ffn, modify: out, form: bottleneck, let: *l}")


HOSTILE = {
    "1500 rows of a form": HEAD + rows(1500, "{at: ffn, modify: out, form: bottleneck}"),
    "500 rows of a form": HEAD + rows(500, "{at: ffn, modify: out, form: bottleneck}"),
    "500 rows of a longer form": HEAD + rows(500, "{at: attention, modify: heads, form: prefix_mlp, compose: gate}"),
    "names near 500 others": HYPERS + rows(500, "{at: ffn, modify: out, form: x + hyper_numbr_#}"),
    "expressions by alias": HEAD + aliased_lets(SUM),
    "long expressions by alias": HEAD + aliased_lets(f"{DEEP}+" * 8 + "x"),
    "long expressions": HEAD + rows(120, f'{{at: ffn, modify: out, form: "{(DEEP + "+") * 8}x"}}'),
    "long lists": HEAD + rows(9, f"{{at: [{'ffn, ' * 500}], modify: [{'out, ' * 500}], form: x}}"),
    "duplicate keys": HEAD + "  a: {at: ffn, modify: out, form: x}\n" * 2000,
    "wrong types": HEAD + rows(500, "[1]"),
    "unknown keys": HEAD + rows(400, "{at: 1, modfy: 1, form: [1], where: {layr: 1, stck: 1}}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_crafted_rule_takes_less_than_two_seconds_of_work(name: str) -> None:
    """The best of three, for a machine at work on other things takes twice as long."""
    assert any(_seconds(name) < 2 for _ in range(3))


def _seconds(name: str) -> float:
    start = time.process_time()
    try:
        parse_rule(HOSTILE[name], "hostile.yaml")
    except PeftcError as error:
        assert len(error.diagnostics) <= 2 * MOST_TOLD
    return time.process_time() - start


def test_a_page_of_mistakes_is_printed_and_the_rest_counted() -> None:
    with pytest.raises(PeftcError) as raised:
        parse_rule(HOSTILE["wrong types"], "hostile.yaml")
    assert len(raised.value.diagnostics) == MOST_TOLD
    text = str(raised.value)
    assert text.count(" error: ") == MOST_SHOWN
    assert text.endswith(f"\n\n... and {MOST_TOLD - MOST_SHOWN} more")


def test_near_name_is_found_among_thousands() -> None:
    names = [f"{'x' * (i % 60)}{i}" for i in range(3000)]
    assert did_you_mean("botleneck", [*names, "bottleneck"]) == "did you mean `bottleneck`?"
    assert did_you_mean("q" * 10_000, ["a", "b"]) == "known: a, b"


def test_list_of_known_names_is_cut() -> None:
    told = did_you_mean("?", [f"name{i:04}" for i in range(500)]) or ""
    assert told.startswith("known: name0000, name0001")
    assert told.endswith("name0039, ...")
