"""Greedy generation by hand: a session of onnxruntime, arrays, argmax. It knows no end token, and nothing of peftc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Arrays = dict[str, np.ndarray]


def _session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _call(session: Any, feeds: Arrays) -> Arrays:
    wanted = {argument.name for argument in session.get_inputs()}
    names = [argument.name for argument in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def _past(found: Arrays) -> Arrays:
    return {k.replace("present", "past_key_values"): v for k, v in found.items() if k.startswith("present")}


def decoder(directory: Path, given: Arrays, count: int) -> np.ndarray:
    """`count` tokens after the prompts, which are padded on the left."""
    session = _session(directory / "model.onnx")
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {
        a.name: np.zeros((len(given["input_ids"]), a.shape[1], 0, a.shape[3]), kinds[a.type])
        for a in session.get_inputs()
        if a.name.startswith("past_key_values")
    }
    assert past
    ids, mask, text = given["input_ids"], given["attention_mask"], given["input_ids"]
    for _ in range(count):
        places = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
        found = _call(session, {"input_ids": ids, "attention_mask": mask, "position_ids": places, **past})
        ids, past = found["logits"][:, -1:].argmax(-1), _past(found)
        text, mask = np.concatenate([text, ids], 1), np.concatenate([mask, np.ones_like(ids)], 1)
    return text


def encoder_decoder(directory: Path, given: Arrays, count: int, start: int) -> np.ndarray:
    """`count` tokens after the start token."""
    names = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
    encoder, first, later = (_session(directory / name) for name in names)
    common = {
        "encoder_hidden_states": _call(encoder, given)["last_hidden_state"],
        "encoder_attention_mask": given["attention_mask"],
    }
    ids = text = np.full((len(given["input_ids"]), 1), start)
    found = _call(first, {"input_ids": ids, **common})
    past = _past(found)
    for _ in range(count):
        ids = found["logits"][:, -1:].argmax(-1)
        text = np.concatenate([text, ids], 1)
        found = _call(later, {"input_ids": ids, **common, **past})
        past |= _past(found)
    return text
