"""A traced tiny BERT and tiny GPT-2, made once; tests that change a program trace their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers

from peftc.frontend.trace import Skeleton, build_skeleton, default_inputs
from peftc.ir.program import Program
from peftc.lang.loader import parse_rule
from peftc.lang.rule import Rule
from peftc.pipeline import analyse


@pytest.fixture(scope="session")
def bert_skeleton() -> Skeleton:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return build_skeleton(transformers.BertModel, config)


@pytest.fixture(scope="session")
def gpt2_skeleton() -> Skeleton:
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    return build_skeleton(transformers.GPT2LMHeadModel, config)


@pytest.fixture
def bert(bert_skeleton: Skeleton) -> Program:
    return analyse(bert_skeleton, default_inputs(bert_skeleton.model))


@pytest.fixture
def gpt2(gpt2_skeleton: Skeleton) -> Program:
    return analyse(gpt2_skeleton, default_inputs(gpt2_skeleton.model))


@pytest.fixture(scope="session")
def rule() -> Callable[[str], Rule]:
    """A rule of one delta row, given the row's flow mapping."""

    def make(row: str, hyper: str = "{r: 4}") -> Rule:
        return parse_rule(f"peftc: 1\nname: test\nhyper: {hyper}\ndeltas:\n  d: {row}\n", "test.yaml")

    return make
