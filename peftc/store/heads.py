"""Which class a model directory is: from its config, or from the head that the user asked for.

Classes are those of the installed transformers; nothing is downloaded and no code of a model directory is run.

    cls, config = resolve(base.config, base.path, head="sequence-classification", num_labels=3)
    cls.__name__            # "BertForSequenceClassification"
    config.num_labels       # 3
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from peftc.diagnostics import did_you_mean, fail

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS: Final[dict[str, str]] = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "next-sentence-prediction": "AutoModelForNextSentencePrediction",
    "pretraining": "AutoModelForPreTraining",
    "image-classification": "AutoModelForImageClassification",
    "masked-image-modeling": "AutoModelForMaskedImageModeling",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "depth-estimation": "AutoModelForDepthEstimation",
    "video-classification": "AutoModelForVideoClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "image-text-to-text": "AutoModelForImageTextToText",
}
"""Head name -> the Auto class of transformers that knows it."""

_MAX_LABELS: Final = 1 << 20  # transformers makes a dictionary of all label names


def resolve(
    config: Mapping[str, Any], path: str | os.PathLike[str], head: str | None = None, num_labels: int | None = None
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The model class and its config object, for a raw config.json.

    Without `head`, the class is the one that `architectures` names, or the base model if it names none. With one,
    the config's `architectures` follows it. `num_labels` is set on the config.

    Raises:
        PeftcError: E032, the model type, the architecture or the head is unknown, or has no labels to count;
            E030, the config is not valid for its model type, or the weights are quantized.
    """
    loaded = _load_config(config, path)
    if head is not None and head not in HEADS:
        fail("E032", f"unknown head `{head}`", help=did_you_mean(head, HEADS))
    names = _architectures(config)
    cls = _from_architectures(loaded, names, path) if head is None and names else _from_head(loaded, head or "base")
    if num_labels is not None:
        _set_labels(loaded, cls, num_labels)
    if head is not None:
        loaded.architectures = [cls.__name__]
    return cls, loaded


def offered(config: PreTrainedConfig) -> list[str]:
    """The heads that transformers offers for the config's model type."""
    from transformers.models.auto import modeling_auto

    autos = {head: getattr(modeling_auto, auto, None) for head, auto in HEADS.items()}
    return [head for head, auto in autos.items() if auto is not None and type(config) in auto._model_mapping]


def _load_config(config: Mapping[str, Any], path: str | os.PathLike[str]) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        message = f"{path}: model type `{model_type}` is not in the installed transformers"
        if config.get("auto_map"):
            message += ", and peftc runs no code that comes with a model (trust_remote_code)"
            fail("E032", message, help="use a model whose class is part of transformers")
        near = did_you_mean(model_type, CONFIG_MAPPING.keys()) or ""
        fail("E032", message, help=near if near.startswith("did") else "upgrade transformers, if the model is new")
    if config.get("quantization_config"):
        message = f"{path}: its weights are quantized, and peftc reads plain ones only"
        fail("E030", message, help="use the model that this one was quantized from")
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        cause = " ".join(str(error).split())
        fail("E030", f"{path}: config.json is not valid for a {model_type} model: {cause}", help="download it again")


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _from_architectures(
    config: PreTrainedConfig, names: list[str], path: str | os.PathLike[str]
) -> type[PreTrainedModel]:
    import transformers

    known = [getattr(transformers, name, None) for name in names]
    classes = [cls for cls in known if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)]
    if not classes:
        fail("E032", f"{path}: transformers has no architecture `{names[0]}`", help=_choose_head(config))
    if not isinstance(config, classes[0].config_class or object):
        message = f"{path}: architecture `{classes[0].__name__}` is not a {config.model_type} model"
        fail("E032", message, help=_choose_head(config))
    return classes[0]


def _choose_head(config: PreTrainedConfig) -> str:
    heads = offered(config)
    if not heads:
        return "use a model that transformers' Auto classes know"
    return f"name a head with --head; {config.model_type} has: {', '.join(heads)}"


def _from_head(config: PreTrainedConfig, head: str) -> type[PreTrainedModel]:
    from transformers.models.auto import modeling_auto

    auto = getattr(modeling_auto, HEADS[head], None)
    if auto is None or type(config) not in auto._model_mapping:
        fail("E032", f"a {config.model_type} model has no head `{head}`", help=_choose_head(config))
    found = auto._model_mapping[type(config)]
    if isinstance(found, tuple):  # several classes for one config: the config says which, or the first
        named = config.architectures or []
        found = next((cls for cls in found if cls.__name__ in named), found[0])
    return found


def _set_labels(config: PreTrainedConfig, cls: type[PreTrainedModel], num_labels: int) -> None:
    if not 1 <= num_labels <= _MAX_LABELS:
        fail("E032", f"the number of labels is {num_labels}", help=f"give a number from 1 to {_MAX_LABELS}")
    if "Classification" not in cls.__name__:
        fail("E032", f"{cls.__name__} has no labels to count", help=_choose_head(config))
    config.num_labels = num_labels
