"""An exported model in onnxruntime against the unfolded model in torch.

An export with a cache is run as it will be used, the first tokens and then two more one by one, and compared with one
call of the unfolded model on the whole text: what is cached must be what torch computes anew.

Up to `WHOLE` bytes of a base both are run whole; beyond, torch goes a weight at a time and onnxruntime a piece of the
graph at a time, so that the memory of a comparison does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from peftc.backends.onnx import OnnxFiles
from peftc.backends.onnx_generation import DECODER, ENCODER, WITH_PAST
from peftc.backends.onnx_run import OnnxGraph, Tensors
from peftc.frontend.trace import InputSpec
from peftc.merging.adapted import Adapted
from peftc.merging.certify import Comparison, Inputs, compared
from peftc.merging.comparing import TOLERANCE, WHOLE, batches_for, unfolded, unfolded_from_disk, vocabulary_of, word
from peftc.runtime.api import load

Outputs = list[list[torch.Tensor]]
"""A list of outputs for each batch."""
STEPS = 2
"""How many tokens are given one by one."""


def compare_onnx(
    adapted: Adapted,
    files: OnnxFiles,
    specs: Mapping[str, InputSpec],
    texts: Sequence[str],
    dtype: torch.dtype | None = None,
) -> list[Comparison]:
    """The exported model, in `dtype`, against the unfolded model in the base's dtype, or float32 where that differs.

    `specs` are the inputs of a call without a cache.
    """
    stored = dtype or adapted.dtype
    reference = adapted.dtype if stored == adapted.dtype else torch.float32
    known = {n: replace(s, dtype=reference) if s.dtype.is_floating_point else s for n, s in specs.items()}
    batches = batches_for(adapted, known, texts)
    seq2seq = ENCODER in files.graphs
    if files.cached and not seq2seq:
        batches = [(f"{label}, padded on the left", padded_left(given)) for label, given in batches]
    inputs = [given for _, given in batches]
    before = in_torch(adapted, known, inputs, reference)
    large, what = is_large(adapted), "model.onnx in onnxruntime"
    if files.cached:
        what, before = "cached steps in onnxruntime", [outputs[:1] for outputs in before]
        parts = {file: OnnxGraph(files.path.parent / file, large=large) for file in files.graphs}
        run = _encode_and_decode if seq2seq else _decode
        after = [[logits] for logits in run(parts, inputs)]
    else:
        after = [list(found.values()) for found in OnnxGraph(files.path, large=large)(inputs)]
    tolerance = max(TOLERANCE[stored], TOLERANCE[reference])
    return [
        compared(what, label, given, one, other, tolerance, word(stored), vocabulary_of(adapted))
        for (label, given), one, other in zip(batches, before, after, strict=True)
    ]


def padded_left(given: Inputs) -> dict[str, torch.Tensor]:
    """The same rows with their padding in front, as generation wants them, and positions counted from each start."""
    mask = given.get("attention_mask")
    if mask is None:
        return dict(given)
    order = mask.argsort(dim=1, stable=True)
    moved = {name: value.gather(1, order) if value.shape == mask.shape else value for name, value in given.items()}
    if "position_ids" in moved:
        moved["position_ids"] = (moved["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return moved


def is_large(adapted: Adapted) -> bool:
    """Whether neither model is to be held in memory."""
    return adapted.base.nbytes > WHOLE


def in_torch(
    adapted: Adapted, specs: Mapping[str, InputSpec], inputs: Sequence[Inputs], dtype: torch.dtype | None = None
) -> Outputs:
    """What the unfolded model answers in `dtype`, by default the base's; a large one in float32."""
    if is_large(adapted):
        return unfolded_from_disk(adapted, specs, torch.float32, inputs)
    same = dtype in (None, adapted.dtype)
    run = unfolded(adapted.model if same else load(adapted.delta.path, adapted.base.path, dtype=dtype), specs)
    return [list(run(given)) for given in inputs]


def _decode(parts: Mapping[str, OnnxGraph], inputs: Sequence[Inputs]) -> list[torch.Tensor]:
    """The logits of a decoder, called with the first tokens and then with one after another."""
    (graph,) = parts.values()
    pasts = [graph.no_past(len(given["input_ids"])) for given in inputs]
    logits: list[list[torch.Tensor]] = [[] for _ in inputs]
    for spans in zip(*(_spans(given["input_ids"].shape[1]) for given in inputs), strict=True):
        calls = []
        for given, past, (first, last) in zip(inputs, pasts, spans, strict=True):
            new = {name: value[:, first:last] for name, value in given.items() if name != "attention_mask"}
            calls.append({**new, **past, "attention_mask": given["attention_mask"][:, :last]})
        for place, found in enumerate(graph(calls)):
            logits[place].append(found["logits"])
            pasts[place] = _past_of(found)
    return [torch.cat(found, 1) for found in logits]


def _encode_and_decode(parts: Mapping[str, OnnxGraph], inputs: Sequence[Inputs]) -> list[torch.Tensor]:
    """The logits of an encoder-decoder, run as its three graphs."""
    pasts: list[Tensors] = [{} for _ in inputs]
    logits: list[list[torch.Tensor]] = [[] for _ in inputs]
    states = [found["last_hidden_state"] for found in parts[ENCODER](inputs)]
    for spans in zip(*(_spans(given["decoder_input_ids"].shape[1]) for given in inputs), strict=True):
        graph = parts[WITH_PAST if any(first for first, _ in spans) else DECODER]
        calls = [
            {
                "input_ids": given["decoder_input_ids"][:, first:last],
                "encoder_hidden_states": state,
                **({"encoder_attention_mask": given["attention_mask"]} if "attention_mask" in given else {}),
                **past,
            }
            for given, state, past, (first, last) in zip(inputs, states, pasts, spans, strict=True)
        ]
        for place, found in enumerate(graph(calls)):
            logits[place].append(found["logits"])
            pasts[place] |= _past_of(found)
    return [torch.cat(found, 1) for found in logits]


def _spans(length: int) -> list[tuple[int, int]]:
    """The first tokens, and single ones."""
    begun = max(1, length - STEPS)
    return [(0, begun), *((place, place + 1) for place in range(begun, begun + STEPS))]


def _past_of(found: Tensors) -> Tensors:
    """What a call gave of its cache, as inputs of the next one."""
    return {name.replace("present.", "past_key_values."): value for name, value in found.items() if name != "logits"}
