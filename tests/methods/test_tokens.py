"""Trainable tokens: what lies beyond the vocabulary is told, and a tied embedding is kept with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from methods.harness import tiny
from peftc import driver
from peftc.diagnostics import PeftcError


def test_a_token_beyond_the_vocabulary_is_told_at_the_op(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(PeftcError) as raised:
        driver.plan("trainable_tokens", tmp_path, {"ids": "3,64"})
    (found,) = raised.value.diagnostics
    assert found.code == "E013"
    assert found.help == "there are rows 0 to 63, and 64 is none of them"
    assert found.span is not None and found.span.text[found.span.col - 1 :].startswith("place(v, ids, d_out)")


def test_rows_of_a_tied_embedding_are_kept_for_the_head_reads_them_too(tmp_path: Path) -> None:
    """The rule moves what tokens are embedded as; one tensor cannot hold that and the head's rows as they were."""
    config = tiny("llama").config
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (fold,) = driver.plan("trainable_tokens", tmp_path, {"ids": "3,40"}).to_json()["folds"]
    assert (fold["result"], fold["sites"]) == ("kept", 1)
    used = "lm_head.weight is used in 2 places (lm_head, model.embed_tokens)"
    assert fold["reason"] == f"{used}, and a checkpoint has one tensor for all of them; it is tied"
