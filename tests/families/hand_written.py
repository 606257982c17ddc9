"""Prefixes by hand: attention in plain torch that models of transformers run in place of their own.

Nothing of peftc computes here. In `attending`, attentions that go through transformers' attention interface call
`attention`, and classes that spell theirs out run the forward written for them here; both put the rows of a module in
front of its keys and values. Biases and masks of the base's own keys come from the base's modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "hand_written"
Rows = tuple[Tensor, Tensor]
"""Keys [l, kv_heads, key_dim] and values [l, kv_heads, head_dim]."""

_ROWS: dict[nn.Module, Rows] = {}


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None = None,
    is_causal: bool | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """softmax(q [P_k; k]ᵀ scale + [0; mask]) [P_v; v], one head after the other."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = torch.zeros(query.shape[-2], key.shape[-2], dtype=query.dtype)
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if mask is None and causal and query.shape[-2] == key.shape[-2] > 1:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    bias = bias[None, None] + sum(part for part in (mask, position_bias) if part is not None)
    heads = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        keys, values = key[:, group], value[:, group]
        shift = bias[:, head if bias.shape[1] > 1 else 0].expand(len(query), -1, -1)
        if module in _ROWS:
            own = head * _ROWS[module][0].shape[1] // query.shape[1]
            rows = [part[:, own].expand(len(query), -1, -1) for part in _ROWS[module]]
            keys, values = torch.cat([rows[0], keys], 1), torch.cat([rows[1], values], 1)
            shift = torch.cat([shift.new_zeros(len(query), query.shape[2], rows[0].shape[1]), shift], 2)
        heads.append(torch.softmax(query[:, head] @ keys.mT * scale + shift, -1) @ values)
    return torch.stack(heads, 2), None


def _heads(module: nn.Module, values: Tensor, count: int) -> Tensor:
    """[B, S, heads * d] to [B, heads, S, d]."""
    return values.unflatten(-1, (count, -1)).transpose(1, 2)


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float, scale: float = 1.0) -> Tensor:
    """softmax([q P_kᵀ; q kᵀ] scale + [0; bias]) [P_v; v], merged to [B, S, heads * d]."""
    scores = q @ k.mT * scale + bias
    if module in _ROWS:
        keys, values = (part.transpose(0, 1) for part in _ROWS[module])
        scores = torch.cat([q @ keys.mT * scale, scores], -1)
        v = torch.cat([values.expand(len(v), -1, -1, -1), v], 2)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(-2)


def _xlnet(self: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, seg_mat: Any = None, attn_mask: Any = None,
           **_: Any) -> Tensor:  # fmt: skip
    """Tensors are [S, B, heads, d]; contents and positions have a bias of the queries each."""
    assert seg_mat is None
    shifted = torch.einsum("ibnd,jbnd->bnij", q + self.r_r_bias, positions)
    bias = self.rel_shift_bnij(shifted, klen=len(k)) * self.scale - 1e30 * attn_mask.permute(2, 3, 0, 1)
    content = [part.permute(1, 2, 0, 3) for part in (q + self.r_w_bias, k, v)]
    return _attend(self, *content, bias, self.scale).transpose(0, 1).unflatten(-1, (self.n_head, -1))


def _wavlm(
    self: Any, hidden: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
) -> tuple[Tensor, None]:
    count = self.num_heads
    bias = gated_position_bias.unflatten(0, (-1, count))
    if attention_mask is not None:
        bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
    q, k, v = (_heads(self, projection(hidden), count) for projection in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(_attend(self, q, k, v, bias, self.head_dim**-0.5)), None


def _longt5(self: Any, hidden: Tensor, mask: Tensor, position_bias: Tensor | None = None, **_: Any) -> Any:
    """Attention over the whole text, where a token sees others up to `block_len` away; padding as in the mask."""
    length = hidden.shape[1]
    if position_bias is None:
        places = torch.arange(length)
        ahead = places[None] - places[:, None]
        sizes = (self.relative_attention_num_buckets, self.relative_attention_max_distance)
        buckets = self._relative_position_bucket(ahead, True, *sizes)
        near = ahead.abs() < self.block_len
        inside = places % self.block_len
        real = mask[:, 0, places // self.block_len, inside, self.block_len + inside]
        seen = near & real[:, :, None] & real[:, None]
        position_bias = self.relative_attention_bias(buckets).permute(2, 0, 1) + torch.where(seen, 0.0, -1e10)[:, None]
    q, k, v = (_heads(self, projection(hidden), self.n_heads) for projection in (self.q, self.k, self.v))
    return self.o(_attend(self, q, k, v, position_bias)), position_bias


def _squeezebert(self: Any, hidden: Tensor, mask: Tensor, *_: Any) -> dict[str, Tensor]:
    """Hidden states are [B, d, S]."""
    parts = [_heads(self, one(hidden).mT, self.num_attention_heads) for one in (self.query, self.key, self.value)]
    return {"context_layer": _attend(self, *parts, mask, self.attention_head_size**-0.5).mT}


def _layoutlmv3(self: Any, hidden: Tensor, mask: Tensor, rel_pos: Tensor, rel_2d_pos: Tensor, **_: Any) -> Any:
    parts = [_heads(self, one(hidden), self.num_attention_heads) for one in (self.query, self.key, self.value)]
    scale = self.attention_head_size**-0.5
    return _attend(self, *parts, (rel_pos + rel_2d_pos) * scale + mask, scale), None


def _deberta(
    self: Any, hidden: Tensor, mask: Tensor, *_: Any, relative_pos: Tensor, rel_embeddings: Tensor, **__: Any
) -> Any:
    projections = (self.query_proj, self.key_proj, self.value_proj)
    parts = [_heads(self, one(hidden), self.num_attention_heads) for one in projections]
    share = 1 + len([kind for kind in ("c2p", "p2c") if kind in self.pos_att_type])
    bias = self.disentangled_attention_bias(
        parts[0].flatten(0, 1), parts[1].flatten(0, 1), relative_pos, rel_embeddings, share
    ).unflatten(0, (len(hidden), -1))
    bias = bias.masked_fill(~mask.bool(), torch.finfo(hidden.dtype).min)
    scale = torch.tensor(parts[0].shape[-1] * share, dtype=torch.float32).sqrt()  # in float32, as the base has it
    return _attend(self, *parts, bias, 1 / float(scale)), None


def _hiera(self: Any, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Every unit of tokens by itself; token t of unit u is the (t * units + u)-th of the sequence."""
    units = hidden.shape[1] // (self.query_stride * self.window_size) if self.use_mask_unit_attn else 1
    answers = []
    for unit in range(units):
        q, k, v = (_heads(self, part, self.num_heads) for part in self.qkv(hidden[:, unit::units]).chunk(3, -1))
        answers.append(_attend(self, q.unflatten(2, (self.query_stride, -1)).amax(2), k, v, 0.0, self.scale))
    return self.proj(torch.stack(answers, 2).flatten(1, 2)), None


def _funnel(self: Any, query: Tensor, key: Tensor, value: Tensor, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor]:
    positions, types, mask, cls_mask = inputs
    count = self.config.n_head
    q = self.q_head(query).unflatten(-1, (count, -1)) * self.scale
    bias = self.relative_positional_attention(positions, q, key.shape[1], cls_mask)
    bias = bias + self.relative_token_type_attention(types, q, cls_mask) - 1e6 * (1 - mask[:, None, None].to(q.dtype))
    content = (q + self.r_w_bias * self.scale).transpose(1, 2)
    k, v = (_heads(self, part, count) for part in (self.k_head(key), self.v_head(value)))
    return (self.layer_norm(query + self.post_proj(_attend(self, content, k, v, bias))),)


def _mpt(self: Any, hidden: Tensor, position_bias: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor, None]:
    """ALiBi as its paper has it, by how far a key is from the query: the rows of a prefix are at no distance."""
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    places = torch.arange(hidden.shape[1])
    bias = (places[None] - places[:, None]) * slopes[:, None, None].to(hidden.dtype)
    parts = [_heads(self, part, self.n_heads) for part in self.Wqkv(hidden).chunk(3, -1)]
    shift = bias[None].masked_fill(attention_mask, torch.finfo(hidden.dtype).min)
    return self.out_proj(_attend(self, *parts, shift, self.softmax_scale)), None


SPELLED_OUT: dict[str, tuple[str, Any]] = {
    "XLNetRelativeAttention": ("rel_attn_core", _xlnet),
    "WavLMAttention": ("torch_multi_head_self_attention", _wavlm),
    "LongT5LocalAttention": ("forward", _longt5),
    "SqueezeBertSelfAttention": ("forward", _squeezebert),
    "LayoutLMv3SelfAttention": ("forward", _layoutlmv3),
    "DisentangledSelfAttention": ("forward", _deberta),
    "HieraMaskUnitAttention": ("forward", _hiera),
    "FunnelRelMultiheadAttention": ("forward", _funnel),
    "MptAttention": ("forward", _mpt),
}
"""Classes that spell their attention out, with the method that is written by hand here."""


@contextlib.contextmanager
def attending(model: nn.Module, rows: Mapping[str, Rows]) -> Iterator[nn.Module]:
    """The model with `rows` in front of the keys and values of the attention at, or inside, each path."""
    spelled = [module for module in model.modules() if type(module).__name__ in SPELLED_OUT]
    if not spelled or type(spelled[0]).__name__ == "LongT5LocalAttention":  # its decoder's goes through the interface
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    for path, its in rows.items():
        inside = [part for part in model.get_submodule(path).modules() if part in spelled]
        _ROWS[inside[0] if inside else model.get_submodule(path)] = its
    with pytest.MonkeyPatch.context() as patch:
        for module in spelled:
            name, forward = SPELLED_OUT[type(module).__name__]
            patch.setattr(type(module), name, forward)
        try:
            yield model
        finally:
            _ROWS.clear()
