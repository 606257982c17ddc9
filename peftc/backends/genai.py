"""`genai_config.json`: how onnxruntime-genai is to call an exported decoder.

It is written where that runtime can: one graph with a cache, in which every layer from the first on keeps keys and
values of one and the same shape. Its format is documented in that project's "Config reference".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.backends.onnx import OnnxFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftc.frontend.cache import CacheLayout
    from peftc.frontend.trace import Skeleton

FILE = "genai_config.json"

_KNOWN = {
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phimoe",
    "qwen2", "qwen3", "smollm3",
}  # fmt: skip
"""Model types that it calls as any decoder with keys and values by layer; all others are `decoder` to it."""
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def write_genai_config(directory: Path, skeleton: Skeleton, files: OnnxFiles, layout: CacheLayout | None) -> bool:
    """Write the file into `directory`; False where this is no model for that runtime."""
    if layout is None or layout.cross or len(files.graphs) != 1:
        return False
    shapes = {layer and (layer.heads, layer.key_width, layer.value_width) for layer in layout.layers}
    shape = shapes.pop()
    if shapes or shape is None or shape[1] != shape[2]:
        return False
    document = {"model": _model(skeleton.model, files, len(layout.layers), shape), "search": _search(skeleton.model)}
    (directory / FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return True


def _model(model: PreTrainedModel, files: OnnxFiles, layers: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    heads, width, _ = shape
    names = ("input_ids", "attention_mask", "position_ids")
    return {
        **_special(model),
        "context_length": _context(model),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": files.path.name,
            "head_size": width,
            "hidden_size": config.hidden_size,
            "inputs": {
                **{name: name for name in names if name in files.inputs},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
        },
        "type": config.model_type if config.model_type in _KNOWN else "decoder",
        "vocab_size": config.vocab_size,
    }


def _special(model: PreTrainedModel) -> dict[str, Any]:
    """Ids of the special tokens; a text without one for padding is padded with its end."""
    found: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name, None)
        found[name] = getattr(model.config, name, None) if value is None else value
    if found["pad_token_id"] is None:
        end = found["eos_token_id"]
        found["pad_token_id"] = end[0] if isinstance(end, list) else end
    return {name: value for name, value in found.items() if value is not None}


def _context(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return next((int(value) for name in _LENGTHS if (value := getattr(config, name, None))), 2048)


def _search(model: PreTrainedModel) -> dict[str, Any]:
    """Greedy, as `generate` is by default; keys and values are new tensors at each step."""
    return {
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": _context(model),
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
