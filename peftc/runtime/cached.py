"""Calls that are a part of a text: with a cache of what came before, or with what an encoder has said already.

A cache is traced once, as tensors in and out (`peftc.frontend.cache`), and serves every length of past and new tokens.
An encoder-decoder's one graph is cut (`peftc.ir.cut`) into encoder, decoder and single step. All of them are rewritten
by the rule, and their plans must say what the model's own plan says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.frontend.cache import CacheLayout, cache_layout, past_specs
from peftc.frontend.trace import InputSpec, default_inputs, forward_arguments
from peftc.ir.cut import cut, outputs
from peftc.ir.program import Program
from peftc.ir.stepwise import resizing
from peftc.runtime.caches import check_cache, crossed, crossed_names, keep, new_cache, past_of, tokens_seen
from peftc.runtime.signature import Call, call_specs

STATE = "encoder_hidden_state"
"""The input of a decoder that is cut from its encoder."""


def answer(model: Any, call: Call) -> Any:
    """Run a call that has a cache, or is to make one, or comes with an encoder's outputs."""
    return _Answer(model, call).run()


def layout_of(model: Any) -> CacheLayout:
    """What the model's cache holds. Raises `PeftcError` E041 where that cannot be traced."""
    layouts = model.surgery.layouts
    key = model.variant()
    if key not in layouts:
        skeleton = model.skeleton()
        layouts[key] = cache_layout(skeleton, default_inputs(skeleton.model))
    return layouts[key]


def cached_specs(model: Any, specs: Mapping[str, InputSpec], layout: CacheLayout) -> dict[str, InputSpec]:
    """The inputs of a call with a cache, from those without: the mask covers what is past too, positions go by row."""
    seq2seq = bool(model.config.is_encoder_decoder)
    prefix, axis, total = ("decoder_", "target", "target_total") if seq2seq else ("", "sequence", "total")
    changed = dict(specs)
    mask, positions = specs.get(f"{prefix}attention_mask"), specs.get(f"{prefix}position_ids")
    if mask is not None and mask.sizes[-1] == axis:
        changed[f"{prefix}attention_mask"] = replace(mask, sizes=(*mask.sizes[:-1], total))
    if positions is not None and len(positions.sizes) == 2:
        changed[f"{prefix}position_ids"] = replace(positions, sizes=("batch", axis))
    return changed | past_specs(layout, model.dtype)


def encode(model: Any, call: Call) -> Any:
    """What the encoder of an encoder-decoder says, its deltas included: the graph as far as that.

    `call` is a call of the encoder. Returns a `BaseModelOutput`.
    """
    from transformers.modeling_outputs import BaseModelOutput

    specs = call_specs(call.tensors, model)
    usual = default_inputs(model.skeleton().model)
    specs.update({name: spec for name, spec in usual.items() if name.startswith("decoder_")})
    program = model.program_of(specs, call.flags, tensors=call.tensors)
    cuts, key = model.surgery.cuts, (id(program), "encoder")
    result = outputs(program)
    fields = {"last_hidden_state": (result["encoder_last_hidden_state"],)}
    for name in ("hidden_states", "attentions"):
        if result.get(f"encoder_{name}") is not None:
            fields[name] = result[f"encoder_{name}"]
    if key not in cuts:
        cuts[key] = cut(program, {}, [n for nodes in fields.values() for n in nodes], set(call.tensors))
    values = list(model.run_flat(cuts[key], call.tensors))
    found = {name: tuple(values.pop(0) for _ in nodes) for name, nodes in fields.items()}
    found["last_hidden_state"] = found["last_hidden_state"][0]
    answer = BaseModelOutput(**found)  # pyright: ignore[reportArgumentType]
    return answer.to_tuple() if call.as_tuple else answer


@dataclass(slots=True)
class _Answer:
    """One such call on its way through the graph."""

    model: Any
    call: Call

    def run(self) -> Any:
        model, call = self.model, self.call
        tensors, encoded = dict(call.tensors), call.encoded
        layout = layout_of(model) if call.cached else None
        cache, past, new = None, {}, 0
        if layout is not None:
            cache = call.cache if call.cache is not None else new_cache(model.config, layout)
            check_cache(cache, layout)
            tokens = self._new_tokens(tensors)
            new = int(tokens.shape[1])
            tensors = self._with_mask(tensors, tokens, tokens_seen(cache, layout) + new)
            past = past_of(cache, layout, tokens.shape[0], model.dtype, model.device)
        specs = call_specs(tensors, model)
        if layout is not None:
            specs = cached_specs(model, specs, layout)
        given = {**tensors, **past}
        program = self._program(specs, layout, given)
        if encoded is not None:
            held = crossed(cache, layout) if layout is not None else None
            program = self._cut(program, held or {})
            given |= {STATE: encoded[0], **(held or {})}
        result = model.execute(program, given)
        if layout is not None:
            keep(cache, layout, result["past_key_values"], new)
            result["past_key_values"] = cache
        if self._last:
            result["logits"] = result["logits"][:, -self._last :]
        if encoded is not None:
            _restore_encoded(result, encoded)
        return result.to_tuple() if call.as_tuple else result

    @property
    def _seq2seq(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def _prefix(self) -> str:
        return "decoder_" if self._seq2seq else ""

    def _new_tokens(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for name in ("input_ids", "inputs_embeds"):
            if self._prefix + name in tensors:
                return tensors[self._prefix + name]
        fail("E041", f"a call with a cache needs `{self._prefix}input_ids`", help="give the tokens that are new")

    def _with_mask(self, tensors: dict[str, torch.Tensor], tokens: torch.Tensor, total: int) -> dict[str, torch.Tensor]:
        """Fill in the mask that stands for none, and spread positions over the batch: calls alike in all else run
        one trace.
        """
        batch, new = tokens.shape[:2]
        name = f"{self._prefix}attention_mask"
        mask = tensors.get(name)
        if mask is None and name in forward_arguments(self.model.surgery.base_class):
            tensors[name] = torch.ones((batch, total), dtype=torch.long, device=tokens.device)
        elif mask is not None and mask.dim() == 2:
            if mask.shape[1] != total:
                fail(
                    "E041",
                    f"`{name}` is {mask.shape[1]} long, but the cache holds {total - new} tokens and {new} are new",
                    help=f"give a mask of {total} for all of them, or none",
                )
            tensors[name] = mask.long()
        positions = tensors.get(f"{self._prefix}position_ids")
        if positions is not None and positions.dim() == 2 and positions.shape[0] == 1:
            tensors[f"{self._prefix}position_ids"] = positions.expand(batch, -1)
        return tensors

    def _program(
        self, specs: dict[str, InputSpec], layout: CacheLayout | None, tensors: Mapping[str, torch.Tensor]
    ) -> Program:
        if self.call.encoded is not None:  # the encoder's own input is traced, and cut off again
            usual = default_inputs(self.model.skeleton().model)
            main = self.model.main_input_name
            specs = {main: usual[main], **specs}
        return self.model.program_of(specs, self._flags(), layout, tensors)

    @property
    def _last(self) -> int:
        """How many of the last logits are asked for, where that changes from call to call; 0 for what a trace gives.

        Assisted decoding asks for as many as there are candidates, and each number would be a trace of its own.
        """
        asked = self.call.flags.get("logits_to_keep", 0)
        return asked if asked > 1 and self.call.cached and "labels" not in self.call.tensors else 0

    def _flags(self) -> dict[str, Any]:
        return {name: value for name, value in self.call.flags.items() if not (name == "logits_to_keep" and self._last)}

    def _cut(self, program: Program, held: Mapping[str, torch.Tensor]) -> Program:
        """The decoder of the program, or one step of it where keys and values of cross attention are at hand."""
        cuts = self.model.surgery.cuts
        key = (id(program), bool(held))
        if key not in cuts:
            cuts[key] = decoder_of(program, [self.model.main_input_name], crossed=bool(held))
        return cuts[key]


def decoder_of(program: Program, before: list[str], *, crossed: bool) -> Program:
    """The part of a program after its encoder. Raises `PeftcError` E041 for deltas that tie both together."""
    result = outputs(program)
    at: dict[str, fx.Node] = {STATE: result["encoder_last_hidden_state"]}
    if crossed:
        for index, rows in enumerate(result["past_key_values"]):
            if rows[0] is not None:
                at.update(zip(crossed_names(index), rows[2:], strict=True))
    shown = {node for name in ("encoder_hidden_states", "encoder_attentions") for node in result.get(name) or ()}
    state = result["encoder_last_hidden_state"]
    everything: Any = program.output_node.args[0]
    part = cut(program, at, [state if node in shown else node for node in everything])
    left = [name for name in before if name in part.inputs]
    if left and (longer := resizing(program)) is not None:
        fail(
            "E041",
            f"the decoder does not run by itself: delta `{longer}` makes the encoder's sequence longer, and the "
            "decoder attends to rows that `encoder_outputs`, which hold the caller's tokens, do not hold",
            help="call the model with `input_ids` and `decoder_input_ids` for each token; `generate` runs the encoder "
            "once, so it needs a rule without such rows, as `prefix`, which puts its own at each attention",
        )
    if left:
        fail(
            "E041",
            "a delta of the decoder reads a value inside the encoder, so the decoder does not run by itself",
            help="call the model with the encoder's inputs, without `encoder_outputs` and without a cache",
        )
    return part


def _restore_encoded(result: Any, encoded: Any) -> None:
    """What the result says of the encoder is what the caller gave."""
    for name in ("hidden_states", "attentions"):
        if f"encoder_{name}" in result and getattr(encoded, name, None) is not None:
            result[f"encoder_{name}"] = encoded[name]
        elif f"encoder_{name}" in result:
            del result[f"encoder_{name}"]
