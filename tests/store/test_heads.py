"""Heads: the class comes from the config or from the head asked for, and a wrong one is answered with what there is."""

from __future__ import annotations

from typing import Any

import pytest

from peftc.diagnostics import PeftcError
from peftc.store.heads import HEADS, offered, resolve

BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 2}


def _name(config: dict[str, Any], head: str | None = None) -> str:
    return resolve(config, "dir", head)[0].__name__


def _refused(config: dict[str, Any], code: str = "E032", **arguments: Any) -> str:
    with pytest.raises(PeftcError) as caught:
        resolve(config, "dir", **arguments)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.help
    return diagnostic.render()


def test_class_is_the_one_the_config_names() -> None:
    assert _name(BERT) == "BertModel"
    assert _name(BERT | {"architectures": ["BertForQuestionAnswering"]}) == "BertForQuestionAnswering"
    assert _name(BERT | {"architectures": ["MyOwn", "BertForMaskedLM"]}) == "BertForMaskedLM"


@pytest.mark.parametrize("architectures", [None, [], "x"])
def test_config_that_names_no_class_means_the_base_model(architectures: object) -> None:
    assert _name({"model_type": "bert", "architectures": architectures}) == "BertModel"
    assert _name({"model_type": "bert"}) == "BertModel"


@pytest.mark.parametrize(
    ("model_type", "head", "expected"),
    [
        ("bert", "masked-lm", "BertForMaskedLM"),
        ("bert", "token-classification", "BertForTokenClassification"),
        ("llama", "causal-lm", "LlamaForCausalLM"),
        ("t5", "seq2seq-lm", "T5ForConditionalGeneration"),
        ("vit", "image-classification", "ViTForImageClassification"),
        ("funnel", "base", "FunnelModel"),
    ],
)
def test_head_chooses_the_class(model_type: str, head: str, expected: str) -> None:
    cls, config = resolve({"model_type": model_type, "architectures": ["Gone"]}, "dir", head)
    assert cls.__name__ == expected
    assert config.architectures == [expected]


def test_config_chooses_among_several_classes_of_a_head() -> None:
    assert _name({"model_type": "funnel", "architectures": ["FunnelBaseModel"]}, "base") == "FunnelBaseModel"


def test_number_of_labels_is_set_on_the_config() -> None:
    _, config = resolve(BERT, "dir", "sequence-classification", 5)
    assert config.num_labels == 5
    assert config.id2label == {i: f"LABEL_{i}" for i in range(5)}


def test_every_head_is_an_auto_class_of_transformers() -> None:
    import transformers

    assert all(hasattr(transformers, auto) for auto in HEADS.values())


def test_unknown_head_is_answered_with_the_nearest() -> None:
    assert "did you mean `causal-lm`?" in _refused(BERT, head="causal")


def test_head_that_a_model_lacks_is_answered_with_those_it_has() -> None:
    text = _refused(BERT, head="image-classification")
    assert "a bert model has no head `image-classification`" in text
    assert "bert has: base, causal-lm, masked-lm, sequence-classification" in text
    assert "base" in offered(resolve(BERT, "dir")[1])


def test_unknown_architecture_is_answered_with_the_heads_there_are() -> None:
    assert "no architecture `BertFoo`" in _refused(BERT | {"architectures": ["BertFoo"]})
    assert "is not a bert model" in _refused(BERT | {"architectures": ["LlamaForCausalLM"]})


def test_unknown_model_type_is_answered_with_the_nearest() -> None:
    assert "did you mean `bert`?" in _refused({"model_type": "brt"})


def test_code_that_comes_with_a_model_is_never_run() -> None:
    text = _refused({"model_type": "my_own_kind", "auto_map": {"AutoModel": "modeling.MyOwn"}})
    assert "trust_remote_code" in text


def test_config_invalid_for_its_model_type_is_refused() -> None:
    assert "hidden_size" in _refused(BERT | {"hidden_size": "wide"}, "E030")


def test_quantized_weights_are_refused() -> None:
    assert "quantized" in _refused(BERT | {"quantization_config": {"quant_method": "gptq"}}, "E030")


@pytest.mark.parametrize("labels", [0, -1, 1 << 40])
def test_impossible_number_of_labels_is_refused_before_anything_is_made(labels: int) -> None:
    assert "number of labels" in _refused(BERT, head="sequence-classification", num_labels=labels)


def test_labels_for_a_class_without_labels_are_refused() -> None:
    assert "BertModel has no labels" in _refused(BERT, num_labels=2)
