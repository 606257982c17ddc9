"""The seed methods, each from its formula; a class is named as its rule, and `METHODS` lists them by that name."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.method import (
    Method,
    Place,
    State,
    attention,
    mean_gate,
    prefix_attention,
    rows,
    scores,
)


class Full(Method):
    """Full fine-tuning: the base model itself."""


class BitFit(Method):
    """b + v for the bias b of every linear layer and LayerNorm."""

    def weights(self, state: State) -> State:
        def moved(name: str, tensor: Tensor) -> Tensor:
            return tensor + self.delta[f"{name.removesuffix('.bias')}.peftc.bias.v"]

        return {name: moved(name, t) if name.endswith(".bias") else t for name, t in state.items()}


class Prompt(Method):
    """The rows of P in front of the embedded words, positions counted from the first row of P."""

    def embeddings(self, words: Tensor) -> Tensor:
        P = self.delta["peftc.prompt.P"]
        return torch.cat([P.expand(words.shape[0], -1, -1), words], 1)


class Prefix(Method):
    """Attn(x W_q, concat(P_k, C W_k), concat(P_v, C W_v))."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        P_k, P_v = self.get(place, "prefix.P_k"), self.get(place, "prefix.P_v")
        return prefix_attention(q, k, v, mask, rows(P_k), rows(P_v))


class PrefixGated(Method):
    """(1 - λ) Attn(q, K, V) + λ Attn(q, P_k, P_v), λ the share of the prefix in the sum of exponentials."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        P_k, P_v = rows(self.get(place, "prefix.P_k")), rows(self.get(place, "prefix.P_v"))
        ours = scores(q, P_k).exp().sum(-1, keepdim=True)
        theirs = (scores(q, k).exp() * mask).sum(-1, keepdim=True)
        gate = ours / (ours + theirs)
        return (1 - gate) * attention(q, k, v, mask) + gate * (scores(q, P_k).softmax(-1) @ P_v)


class PrefixMlp(Method):
    """P_k and P_v from tanh(E W_1 + b_1) W_2 + b_2; E, W_1, b_1 one for each kind of attention."""

    def shared(self, place: Place, name: str) -> Tensor:
        """A tensor that all attentions of this kind have in common."""
        ending = f"peftc.prefix.{place.stack}_{place.kind}.{name}"
        (found,) = (tensor for key, tensor in self.delta.items() if key.endswith(ending))
        return found

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        z = torch.tanh(self.shared(place, "E") @ self.shared(place, "W_1").T + self.shared(place, "b_1"))
        flat = z @ self.get(place, "prefix.W_2").T + self.get(place, "prefix.b_2")
        P_k, P_v = flat.chunk(2, -1)
        width = q.shape[-1]
        P_k, P_v = P_k.unflatten(-1, (-1, width)), P_v.unflatten(-1, (-1, width))
        return prefix_attention(q, k, v, mask, rows(P_k), rows(P_v))


class PrefixUngated(Method):
    """Attn(q, K, V) + Attn(q, P_k, P_v)."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        P_k, P_v = rows(self.get(place, "prefix.P_k")), rows(self.get(place, "prefix.P_v"))
        return attention(q, k, v, mask) + scores(q, P_k).softmax(-1) @ P_v


class Houlsby(Method):
    """h + f(h W_down) W_up after the attention and after the FFN."""

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "attn", h)

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "ffn", h)


class Pfeiffer(Method):
    """h + f(h W_down) W_up after the FFN's add and norm."""

    def block_out(self, place: Place, h: Tensor) -> Tensor:
        return h + self.adapter(place, "adapter", h)


class SeqAttn(Method):
    """h + f(h W_down) W_up after the attention."""

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "adapter", h)


class SeqFfn(Method):
    """h + f(h W_down) W_up after the FFN."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "adapter", h)


class Lora(Method):
    """h + (α / r) x A B on the query and value projections."""

    def query(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["alpha"] / self.hyper["r"] * self.low_rank(place, "lora.q", x)

    def value(self, place: Place, ctx: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["alpha"] / self.hyper["r"] * self.low_rank(place, "lora.v", ctx)


class LoraFfn(Method):
    """h + s x A B on both matrices of the FFN."""

    def ffn_up(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["s"] * self.low_rank(place, "up", x)

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["s"] * self.low_rank(place, "down", mid)


class PaAttn(Method):
    """h + f(x W_down) W_up, x the attention's input."""

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "adapter", x)


class PaFfn(Method):
    """h + f(x W_down) W_up, x the FFN's input."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "adapter", x)


class PaPa(Method):
    """h + f(x W_down) W_up at the attention and at the FFN."""

    def attention_out(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "attn", x)

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(place, "ffn", x)


class MhPa(Method):
    """head_i + ReLU(x W_down,i + b_down,i) W_up,i + b_up,i, head by head."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        W_down, W_up = self.get(place, "adapter.W_down"), self.get(place, "adapter.W_up")
        b_down, b_up = self.get(place, "adapter.b_down"), self.get(place, "adapter.b_up")
        base = attention(q, k, v, mask)
        return torch.stack(
            [base[:, i] + torch.relu(x @ W_down[i].T + b_down[i]) @ W_up[i].T + b_up[i] for i in range(base.shape[1])],
            1,
        )


class ScaledPa(Method):
    """h + s f(x W_down) W_up at the FFN, s a number of the rule."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["s"] * self.adapter(place, "adapter", x)


class ScaledPaLearned(Method):
    """h + s f(x W_down) W_up at the FFN, s trained."""

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.get(place, "adapter.s") * self.adapter(place, "adapter", x)


class PrefixLora(Method):
    """Prefix tuning at the attention, h + s x A B on both matrices of the FFN."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        P_k, P_v = self.get(place, "prefix.P_k"), self.get(place, "prefix.P_v")
        return prefix_attention(q, k, v, mask, rows(P_k), rows(P_v))

    def ffn_up(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["s"] * self.low_rank(place, "up", x)

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["s"] * self.low_rank(place, "down", mid)


class Mam(Method):
    """Prefix tuning at the attention, h + s f(x W_down) W_up at the FFN."""

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        P_k, P_v = self.get(place, "prefix.P_k"), self.get(place, "prefix.P_v")
        return prefix_attention(q, k, v, mask, rows(P_k), rows(P_v))

    def ffn_out(self, place: Place, x: Tensor, mid: Tensor, h: Tensor) -> Tensor:
        return h + self.hyper["s"] * self.adapter(place, "adapter", x)


class UniPelt(Method):
    """LoRA, prefix and adapter, each under the mean over the sequence of sigmoid(input W_g).

    The gate of the prefix scales P_k and P_v; the adapter is Pfeiffer's, its gate reads its own input.
    """

    def query(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        gate = mean_gate(x, self.get(place, "lora.q.W_g"))
        return h + gate * (self.hyper["alpha"] / self.hyper["r_lora"]) * self.low_rank(place, "lora.q", x)

    def value(self, place: Place, ctx: Tensor, h: Tensor) -> Tensor:
        gate = mean_gate(ctx, self.get(place, "lora.v.W_g"))
        return h + gate * (self.hyper["alpha"] / self.hyper["r_lora"]) * self.low_rank(place, "lora.v", ctx)

    def heads(self, place: Place, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        gate = mean_gate(x, self.get(place, "prefix.W_g")).unsqueeze(-1)
        P_k, P_v = self.get(place, "prefix.P_k"), self.get(place, "prefix.P_v")
        return prefix_attention(q, k, v, mask, gate * rows(P_k), gate * rows(P_v))

    def block_out(self, place: Place, h: Tensor) -> Tensor:
        return h + mean_gate(h, self.get(place, "adapter.W_g")) * self.adapter(place, "adapter", h)


METHODS: dict[str, type[Method]] = {
    "full": Full,
    "bitfit": BitFit,
    "prompt": Prompt,
    "prefix": Prefix,
    "prefix_gated": PrefixGated,
    "prefix_mlp": PrefixMlp,
    "prefix_ungated": PrefixUngated,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "seq_attn": SeqAttn,
    "seq_ffn": SeqFfn,
    "lora": Lora,
    "lora_ffn": LoraFfn,
    "pa_attn": PaAttn,
    "pa_ffn": PaFfn,
    "pa_pa": PaPa,
    "mh_pa": MhPa,
    "scaled_pa": ScaledPa,
    "scaled_pa_learned": ScaledPaLearned,
    "prefix_lora": PrefixLora,
    "mam": Mam,
    "unipelt": UniPelt,
}
