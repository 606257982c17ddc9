"""BART's forward pass in plain torch on a dict of weights, in evaluation mode (Lewis et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.method import Method, Place, State, activation, layer_norm, linear, merge, split

HEADS, LAYERS, EPS, OFFSET = 4, 2, 1e-5, 2


def bart(state: State, method: Method, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
    """BartForConditionalGeneration's logits [B, T, vocab]; `attention_mask` [B, S] is 1 or 0."""
    state = method.weights(state)
    table = state["model.shared.weight"]
    words = method.embeddings(table[input_ids])
    mask = torch.nn.functional.pad(attention_mask.bool(), (words.shape[1] - input_ids.shape[1], 0), value=True)
    mask = mask[:, None, None, :]
    memory = _embed(state, "model.encoder", words)
    for layer in range(LAYERS):
        path = f"model.encoder.layers.{layer}"
        memory = _attend(state, method, Place(f"{path}.self_attn", "encoder", "self"), memory, memory, mask)
        memory = _ffn(state, method, Place(path, "encoder"), memory)

    length = decoder_input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    x = _embed(state, "model.decoder", table[decoder_input_ids])
    for layer in range(LAYERS):
        path = f"model.decoder.layers.{layer}"
        x = _attend(state, method, Place(f"{path}.self_attn", "decoder", "self"), x, x, causal)
        x = _attend(state, method, Place(f"{path}.encoder_attn", "decoder", "cross"), x, memory, mask)
        x = _ffn(state, method, Place(path, "decoder"), x)
    return x @ table.T + state["final_logits_bias"]


def _embed(state: State, path: str, words: Tensor) -> Tensor:
    positions = state[f"{path}.embed_positions.weight"][OFFSET : OFFSET + words.shape[1]]
    return layer_norm(words + positions, state, f"{path}.layernorm_embedding", EPS)


def _attend(state: State, method: Method, here: Place, x: Tensor, ctx: Tensor, mask: Tensor) -> Tensor:
    q = method.query(here, x, linear(x, state, f"{here.path}.q_proj"))
    k = linear(ctx, state, f"{here.path}.k_proj")
    v = method.value(here, ctx, linear(ctx, state, f"{here.path}.v_proj"))
    heads = method.heads(here, x, split(q, HEADS), split(k, HEADS), split(v, HEADS), mask)
    out = method.attention_out(here, x, linear(merge(heads), state, f"{here.path}.out_proj"))
    return layer_norm(x + out, state, f"{here.path}_layer_norm", EPS)


def _ffn(state: State, method: Method, here: Place, x: Tensor) -> Tensor:
    mid = activation("gelu", method.ffn_up(here, x, linear(x, state, f"{here.path}.fc1")))
    out = method.ffn_out(here, x, mid, linear(mid, state, f"{here.path}.fc2"))
    return method.block_out(here, layer_norm(x + out, state, f"{here.path}.final_layer_norm", EPS))
