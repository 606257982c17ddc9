"""What an ONNX export of a model that generates is made of: graphs that take and give keys and values of past tokens.

A decoder is one graph, `model.onnx`, for the first tokens (a past of length 0) and for those after:

    input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence],
    past_key_values.N.key and .value [batch, kv_heads, past, head_dim]  ->  logits, present.N.key and .value

An encoder-decoder is three, as optimum lays them out (its `ORTModelForSeq2SeqLM` reads a directory of these names):
`encoder_model.onnx`, `decoder_model.onnx` for the first tokens, whose keys and values of cross attention come out, and
`decoder_with_past_model.onnx`, where they go in. All three share one file of weights.

A layer with a sliding window takes the whole past, as the others do: its mask leaves out what has left the window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftc.backends.onnx import MODEL, Part
from peftc.frontend.cache import CacheLayout, past_names, past_specs
from peftc.frontend.trace import InputSpec
from peftc.ir.cut import cut, outputs
from peftc.runtime.cached import STATE, decoder_of
from peftc.runtime.caches import crossed_names

if TYPE_CHECKING:
    import torch
    from torch import fx

    from peftc.ir.program import Program

ENCODER, DECODER, WITH_PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"


def without_windows(layout: CacheLayout) -> CacheLayout:
    """The same cache with all tokens in every layer."""
    return replace(layout, layers=tuple(layer and replace(layer, window=0) for layer in layout.layers))


def cached_inputs(specs: Mapping[str, InputSpec], layout: CacheLayout, dtype: torch.dtype) -> dict[str, InputSpec]:
    """The inputs of a trace with this cache, from those without."""
    changed = dict(specs)
    if "decoder_input_ids" not in specs and "attention_mask" in specs:
        changed["attention_mask"] = replace(specs["attention_mask"], sizes=("batch", "total"))
    return changed | past_specs(layout, dtype)


@dataclass(frozen=True, slots=True)
class Graphs:
    """The parts of an export with a cache, from a program that was traced with `layout` and folded."""

    program: Program
    specs: Mapping[str, InputSpec]
    layout: CacheLayout

    def parts(self, main: str) -> list[Part]:
        """`main` is the input that an encoder reads. Raises `PeftcError` E041 where deltas tie both halves together."""
        return self._seq2seq(main) if self.layout.cross else [self._decoder()]

    def _decoder(self) -> Part:
        result = outputs(self.program)
        returned = {"logits": result["logits"], **_present(result, "", 0)}
        renamed = self._named(past_names, "")
        return Part(MODEL, _returning(self.program, returned), self.specs, tuple(returned), renamed)

    def _seq2seq(self, main: str) -> list[Part]:
        state: fx.Node = outputs(self.program)["encoder_last_hidden_state"]
        first, later = (decoder_of(self.program, [main], crossed=crossed) for crossed in (False, True))
        made, step = outputs(first), outputs(later)
        own = {"logits": made["logits"], **_present(made, ".decoder", 0)}
        both = {**own, **_present(made, ".encoder", 2)}
        after = {"logits": step["logits"], **_present(step, ".decoder", 0)}
        renamed = {
            "decoder_input_ids": "input_ids", "attention_mask": "encoder_attention_mask",
            STATE: "encoder_hidden_states", **self._named(past_names, ".decoder"),
            **self._named(crossed_names, ".encoder"),
        }  # fmt: skip
        specs = {**self.specs, STATE: _spec(state, 1), **self._crossed(later)}
        empty = frozenset(self._named(past_names, ""))
        return [
            Part(ENCODER, cut(self.program, {}, [state], self._of_encoder()), self.specs, ("last_hidden_state",)),
            Part(DECODER, _returning(first, both), specs, tuple(both), renamed, empty),
            Part(WITH_PAST, _returning(later, after), specs, tuple(after), renamed),
        ]

    def _of_encoder(self) -> set[str]:
        """The inputs that a call of the encoder has: sizes are read from these."""
        return {name for name in self.program.inputs if not name.startswith(("decoder_", "past_"))}

    def _named(self, names: Callable[[int], tuple[str, str]], infix: str) -> dict[str, str]:
        """What the inputs for keys and values of each layer are called in the file."""
        return {
            name: f"past_key_values.{index}{infix}.{word}"
            for index, layer in enumerate(self.layout.layers)
            if layer is not None
            for name, word in zip(names(index), ("key", "value"), strict=True)
        }

    def _crossed(self, later: Program) -> dict[str, InputSpec]:
        wanted = self._named(crossed_names, "")
        return {name: _spec(node, 2) for name, node in later.placeholders("input").items() if name in wanted}


def _returning(program: Program, nodes: Mapping[str, fx.Node]) -> Program:
    """The part of a program that these results need, with the inputs that it reads; none stays for its size alone that
    others have as well, least of all what the encoder said."""
    return cut(program, {}, list(nodes.values()), {*program.inputs} - {STATE})


def _present(result: Any, infix: str, start: int) -> dict[str, fx.Node]:
    """Keys and values after the call, by the names of outputs; `start` is their place in what a layer keeps."""
    found: dict[str, fx.Node] = {}
    for index, rows in enumerate(result["past_key_values"]):
        for word, node in zip(("key", "value"), rows[start : start + 2], strict=False):
            if node is not None:
                found[f"present.{index}{infix}.{word}"] = node
    return found


def _spec(node: fx.Node, sequence: int) -> InputSpec:
    """The input that takes the place of a value of the encoder; `sequence` is its axis of tokens."""
    value = node.meta["val"]
    sizes: list[str | int] = list(value.shape)
    sizes[0], sizes[sequence] = "batch", "sequence"
    return InputSpec(value.dtype, tuple(sizes))
