"""An adapted model is called as its base is. LoRA starts as the identity, so every output must be the base's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftc.diagnostics import PeftcError
from peftc.runtime.signature import input_spec
from runtime.tiny import batch, seq2seq_batch

Load = Callable[..., Any]


def leaves(result: Any) -> list[Tensor]:
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def assert_same(model: Any, base: Any, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        found, wanted = model(*args, **kwargs), base(*args, **kwargs)
    if isinstance(wanted, tuple):
        assert isinstance(found, tuple)
    else:
        assert type(found) is type(wanted)
    assert len(leaves(found)) == len(leaves(wanted))
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


MASK = batch()["attention_mask"]
CALLS: dict[str, dict[str, Any]] = {
    "no mask": {"attention_mask": None},
    "float mask": {"attention_mask": MASK.float()},
    "bool mask": {"attention_mask": MASK.bool()},
    "4D mask": {"attention_mask": MASK[:, None, None, :].expand(3, 1, 9, 9).bool()},
    "4D mask that broadcasts": {"attention_mask": MASK[:, None, None, :].bool()},
    "token types": {"token_type_ids": (batch()["input_ids"] > 50).long()},
    "position ids": {"position_ids": torch.arange(8, -1, -1)[None]},
    "position ids by row": {"position_ids": torch.arange(9).expand(3, 9).flip(1)},
    "labels": {"labels": torch.tensor([0, 2, 1])},
    "counted labels": {"labels": torch.tensor([0, 2, 1]), "num_items_in_batch": torch.tensor(3)},
    "labels of classes": {"labels": torch.tensor([[0.0, 1.0, 1.0]] * 3)},
    "tuple": {"return_dict": False},
    "tuple with loss": {"return_dict": False, "labels": torch.tensor([0, 2, 1])},
    "hidden states": {"output_hidden_states": True},
    "flags that are off": {"output_hidden_states": False, "output_attentions": False},
    "everything None": {"token_type_ids": None, "position_ids": None, "inputs_embeds": None, "labels": None},
}


@pytest.mark.parametrize("name", CALLS)
def test_bert_answers_as_its_base(adapted: Load, plain: Load, name: str) -> None:
    base = plain("bert")
    base.config.problem_type = None
    assert_same(adapted("bert"), base, **{**batch(), **CALLS[name]})


def test_embeddings_in_place_of_ids_answer_as_the_base(adapted: Load, plain: Load) -> None:
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    assert_same(adapted("bert"), plain("bert"), inputs_embeds=embeds, attention_mask=batch(2, 7)["attention_mask"])


def test_positional_arguments_are_those_of_the_base(adapted: Load, plain: Load) -> None:
    given = batch()
    assert_same(adapted("bert"), plain("bert"), given["input_ids"], given["attention_mask"])


def test_unknown_arguments_are_treated_as_by_the_base(adapted: Load, plain: Load) -> None:
    with pytest.raises(TypeError):
        plain("gpt2")(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
    with pytest.raises(TypeError):
        adapted("gpt2")(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)


def test_attentions_are_given_where_the_base_computes_them(adapted: Load, plain: Load) -> None:
    model, base = adapted("bert", seed=7), plain("bert")
    for one in (model, base):
        one.set_attn_implementation("eager")
    assert_same(model, base, **batch(), output_attentions=True)


def test_flags_of_the_config_hold(adapted: Load, plain: Load) -> None:
    model, base = adapted("bert", seed=8), plain("bert")
    for one in (model, base):
        one.config.output_hidden_states = True
    assert_same(model, base, **batch())


@pytest.mark.parametrize(("size", "length"), [(1, 9), (3, 1), (1, 1), (5, 13), (2, 2), (7, 40)])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_one_trace_serves_every_batch_and_length(adapted: Load, plain: Load, name: str, size: int, length: int) -> None:
    model = adapted(name)
    model(**batch())
    traces = len(model.surgery.programs)
    assert_same(model, plain(name), **batch(size, length))
    assert len(model.surgery.programs) == traces


@pytest.mark.parametrize(("size", "length", "target"), [(1, 9, 4), (3, 1, 1), (1, 1, 1), (2, 5, 17)])
def test_one_trace_serves_every_source_and_target_length(
    adapted: Load, plain: Load, size: int, length: int, target: int
) -> None:
    model = adapted("bart")
    model(**seq2seq_batch())
    traces = len(model.surgery.programs)
    assert_same(model, plain("bart"), **seq2seq_batch(size, length, target))
    assert len(model.surgery.programs) == traces


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama", None), ("llama", 11), ("llama", torch.tensor(11)), ("gpt2", None), ("bart", None)],
)
def test_loss_is_the_base_models(adapted: Load, plain: Load, name: str, count: Any) -> None:
    labels = batch()["input_ids"].masked_fill(batch()["attention_mask"] == 0, -100)
    assert_same(adapted(name), plain(name), **batch(), labels=labels, num_items_in_batch=count)


def test_every_count_of_items_runs_one_trace(adapted: Load) -> None:
    model, labels = adapted("llama"), batch()["input_ids"]
    traces = set()
    for count in (3, 8, torch.tensor(5)):
        model(**batch(), labels=labels, num_items_in_batch=count)
        traces.add(len(model.surgery.programs))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("llama", {"past_key_values": ((None, None),)}, "takes no tuple as `past_key_values`"),
        ("bert", {"use_cache": True}, "keeps no cache: it returns none"),
        ("bart", {"encoder_outputs": "text", "decoder_input_ids": None}, "takes no str as `encoder_outputs`"),
    ],
)
def test_a_cache_that_cannot_be_used_is_refused_by_name(
    adapted: Load, name: str, given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PeftcError, match=rf"E041 error: an adapted \w+ {reason}"):
        adapted(name)(**{**batch(), **given})


def test_an_argument_that_is_no_tensor_is_refused_by_name(adapted: Load) -> None:
    with pytest.raises(PeftcError, match=r"E041 error: an adapted model takes no list as `input_ids`"):
        adapted("bert")(input_ids=[[1, 2, 3]])


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_dropout_is_the_bases_own(adapted: Load, plain: Load, name: str) -> None:
    given = seq2seq_batch() if name == "bart" else batch()
    model, base = adapted(name, seed=9).train(), plain(name).train()
    results = []
    for one in (model, base):
        torch.manual_seed(5)
        results.append(one(**given).logits.detach())
    torch.testing.assert_close(*results)
    again = model(**given).logits.detach()
    assert not torch.equal(results[0], again), "dropout is random in training"
    model.eval()
    assert torch.equal(model(**given).logits, model(**given).logits)
    assert_same(model, base.eval(), **given)


def test_positions_of_time_height_and_width_have_their_batch_second() -> None:
    positions = torch.zeros(3, 5, 7, dtype=torch.long)
    assert input_spec("position_ids", positions, encoder_decoder=False).sizes == (3, "batch", "sequence")
    assert input_spec("position_ids", positions[0], encoder_decoder=False).sizes == ("batch", "sequence")
