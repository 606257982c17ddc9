"""BERT's forward pass in plain torch on a dict of weights, in evaluation mode (Devlin et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.method import Method, Place, State, activation, layer_norm, linear, merge, split

HEADS, LAYERS, EPS = 4, 2, 1e-12


def bert(state: State, method: Method, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """BertModel's last hidden state [B, S, d] and pooler output [B, d]; `attention_mask` [B, S] is 1 or 0."""
    state = method.weights(state)
    length = input_ids.shape[1]
    words = method.embeddings(state["embeddings.word_embeddings.weight"][input_ids])
    rows = words.shape[1] - length
    x = words + state["embeddings.position_embeddings.weight"][: rows + length]
    x = x + state["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, state, "embeddings.LayerNorm", EPS)
    mask = torch.nn.functional.pad(attention_mask.bool(), (rows, 0), value=True)[:, None, None, :]
    for layer in range(LAYERS):
        x = _layer(state, method, f"encoder.layer.{layer}", x, mask)
    x = x[:, rows:]
    return x, torch.tanh(linear(x[:, 0], state, "pooler.dense"))


def _layer(state: State, method: Method, path: str, x: Tensor, mask: Tensor) -> Tensor:
    here = Place(f"{path}.attention", "encoder", "self")
    q = method.query(here, x, linear(x, state, f"{path}.attention.self.query"))
    k = linear(x, state, f"{path}.attention.self.key")
    v = method.value(here, x, linear(x, state, f"{path}.attention.self.value"))
    heads = method.heads(here, x, split(q, HEADS), split(k, HEADS), split(v, HEADS), mask)
    out = method.attention_out(here, x, linear(merge(heads), state, f"{path}.attention.output.dense"))
    x = layer_norm(x + out, state, f"{path}.attention.output.LayerNorm", EPS)

    here = Place(path, "encoder")
    mid = activation("gelu", method.ffn_up(here, x, linear(x, state, f"{path}.intermediate.dense")))
    out = method.ffn_out(here, x, mid, linear(mid, state, f"{path}.output.dense"))
    return method.block_out(here, layer_norm(x + out, state, f"{path}.output.LayerNorm", EPS))
