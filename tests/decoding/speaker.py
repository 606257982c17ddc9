"""A model that writes text, a base or an adapted one, called in the same ways: the whole text, in steps, `generate`.

Calls are those that transformers' `generate` makes: a mask always, positions where the model takes them, the last
logits of a step only; an encoder runs once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NEW = 6


@dataclass(frozen=True, slots=True)
class Speaker:
    """`given` is what an encoder reads; `mask` of it says where padding is, if it can be padded."""

    model: Any
    given: Mapping[str, Tensor]
    positions: bool

    @classmethod
    def of(cls, model: Any, given: Mapping[str, Tensor]) -> Speaker:
        """Positions are given where a model takes them and reads no encoder."""
        return cls(model, given, not model.config.is_encoder_decoder and "position_ids" in _accepted(model))

    @property
    def seq2seq(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def cache(self) -> str:
        """The argument that a cache goes by."""
        others = [name for name in ("cache_params", "mems", "state") if name in self.accepted]
        return "past_key_values" if "past_key_values" in self.accepted or not others else others[0]

    @property
    def accepted(self) -> frozenset[str]:
        return _accepted(self.model)

    def reading(self, given: Mapping[str, Tensor]) -> Speaker:
        return replace(self, given=given)

    def whole(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of every token: [batch, tokens, vocabulary]."""
        with torch.no_grad():
            return self.model(**self.given, **self._tokens(ids, mask)).logits

    def steps(self, ids: Tensor, first: int) -> Tensor:
        """Logits of the tokens from `first` - 1 on: `first` of them at once, then each by itself with the cache."""
        cache, found, call = None, [], dict(self.given)
        with torch.no_grad():
            if self.seq2seq:
                call = {name: value for name, value in self.given.items() if name == "attention_mask"}
                call["encoder_outputs"] = self.model.get_encoder()(**self.given)
            for start, end in zip([0, *range(first, ids.shape[1])], range(first, ids.shape[1] + 1), strict=True):
                tokens = self._tokens(ids[:, :end], None) | {self.cache: cache, "use_cache": True}
                for name in ("input_ids", "decoder_input_ids", "position_ids"):
                    if name in tokens:
                        tokens[name] = tokens[name][:, start:]
                if "logits_to_keep" in self.accepted:
                    tokens["logits_to_keep"] = 1
                result = self.model(**call, **tokens)
                cache = getattr(result, self.cache, None)
                if cache is None:
                    raise LookupError(f"it returns no `{self.cache}`")
                found.append(result.logits[:, -1:])
        return torch.cat(found, 1)

    def written(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What `generate` adds to a text, greedily; an encoder-decoder starts from `ids`."""
        options: dict[str, Any] = {
            "max_new_tokens": NEW, "do_sample": False, "num_beams": 1, "pad_token_id": 1, "eos_token_id": None,
            "forced_eos_token_id": None, "forced_bos_token_id": None, "suppress_tokens": None,
            "begin_suppress_tokens": None, "no_repeat_ngram_size": 0, "min_length": 0,
        }  # fmt: skip
        if self.seq2seq:
            options["decoder_start_token_id"] = int(ids[0, 0])
            text = dict(self.given)
        else:
            text = {**self.given, "input_ids": ids, "attention_mask": mask}
        return self.model.generate(**text, **options)[:, -NEW:]

    def loop(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of the largest logits, each from the whole text; and by how much each was ahead of the next."""
        margins = []
        for _ in range(NEW):
            best = self.whole(ids, None if self.seq2seq else mask)[:, -1:].double().topk(2)
            token = best.indices[..., 0]
            margins.append(best.values[..., 0] - best.values[..., 1])
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        return ids[:, -NEW:], torch.cat(margins, 1)

    def _tokens(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        if self.seq2seq:
            return {"decoder_input_ids": ids, "use_cache": False}
        mask = torch.ones_like(ids) if mask is None else mask
        call: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if "attention_mask" in self.accepted:
            call["attention_mask"] = mask
        if self.positions:
            call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return call


def _accepted(model: Any) -> frozenset[str]:
    surgery = getattr(model, "surgery", None)
    cls = type(model) if surgery is None else surgery.base_class
    return frozenset(inspect.signature(cls.forward).parameters)
