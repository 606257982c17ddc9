"""`generate` on a graph: transformers' own loops, over calls with a cache and, in encoder-decoders, over its halves.

Where the rule or the model does not admit a cache, `generate` computes every token from the whole text and says why.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NoReturn

import torch

from peftc.diagnostics import PeftcError, fail
from peftc.frontend.trace import InputSpec, default_inputs, forward_arguments
from peftc.ir.positions import prefix_counted_from_the_first_column
from peftc.runtime.signature import read_call


class Generates:
    """What a `GraphModel` does to generate; see the module docstring."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`, with a cache where the base has one.

        A rule or a model that does not admit a cache generates without one, and a warning says why; where a cache is
        asked for by name (`use_cache=True`, `past_key_values`, `cache_implementation`) that is an error, E041. A
        warning says where rows that are padded at the left answer otherwise than alone; see `preparing`.
        """
        base: Any = super()
        if str(_setting("cache_implementation", kwargs) or "").startswith("offloaded"):
            from peftc.runtime.caches import refuse_offloaded

            refuse_offloaded()  # before transformers makes one, which takes a device that has streams
        reason = uncached(self) if _takes_cache(self, kwargs) else None
        if reason is not None:
            asked = next((name for name in _ASKING if kwargs.get(name)), None)
            if asked is not None:
                fail(
                    "E041",
                    f"`{asked}`: {reason}",
                    help="leave it out: every token is then computed from the whole text",
                )
            warnings.warn(f"generating without a cache: {reason}", stacklevel=2)
            kwargs = {**kwargs, "use_cache": False}
        return base.generate(*args, **kwargs)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder of an encoder-decoder, with its deltas: a part of the graph, over the base's module."""
        model: Any = self
        base: Any = super()
        module = base.get_encoder(*args, **kwargs)
        if not model.config.is_encoder_decoder or args or kwargs:
            return module
        return GraphEncoder(model, module)

    @staticmethod
    def create_masks_for_generate(config: Any, inputs_embeds: Any, attention_mask: Any, *_: Any, **__: Any) -> Any:
        """The graph makes its masks of the one mask that it takes, for static caches too."""
        return attention_mask

    def _supports_mm_encoder_outputs(self) -> bool:
        """Images go to the graph, whose deltas may reach into the tower that reads them: none is encoded before."""
        return False

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        """`generate` does not compile the graph by itself, whatever the cache."""
        return False


WITHOUT = "leave the cache out: `generate(use_cache=False)` computes every token from the whole text"
_ASKING = ("use_cache", "past_key_values", "cache_implementation")


def _takes_cache(model: Any, given: dict[str, Any]) -> bool:
    asked = _setting("use_cache", given)
    return bool(asked) if asked is not None else getattr(model.generation_config, "use_cache", None) is not False


def _setting(name: str, given: dict[str, Any]) -> Any:
    """What a call of `generate` says of a setting, itself or in its `generation_config`; None where it says nothing."""
    value = given.get(name)
    return value if value is not None else getattr(given.get("generation_config"), name, None)


def _padded_left(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())


def preparing(base: type[Any]) -> dict[str, Any]:
    """`prepare_inputs_for_generation` of an adapted `base`: the base's, with a warning where padding shifts a prefix.

    What positions a class gives its forward is seen only here: EXAONE 4.5 takes them and gives none. Empty for a class
    that does not generate; see `peftc.ir.positions`.
    """
    original = getattr(base, "prepare_inputs_for_generation", None)
    if original is None:
        return {}

    @functools.wraps(original)  # transformers reads its signature
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = original(self, *args, **kwargs)
        if kwargs.get("is_first_iteration") and _padded_left(kwargs.get("attention_mask")):
            reason = counts_padding(self) if given.get("position_ids") is None else None
            if reason is not None:
                warnings.warn(reason, stacklevel=2)
        return given

    return {"prepare_inputs_for_generation": prepare_inputs_for_generation}


def counts_padding(model: Any) -> str | None:
    """Why rows with padding at the left and without positions differ from each alone; None where they do not."""
    found = (prefix_counted_from_the_first_column(program) for program in model.surgery.programs.values())
    delta = next(filter(None, found), None)
    if delta is None:
        return None
    name = model.surgery.base_class.__name__
    return (
        f"{name} counts positions from the first column, padding included, so rows that are padded at the left see "
        f"delta `{delta}` from further away than alone; pad at the right, or give texts of one length"
    )


def uncached(model: Any) -> str | None:
    """Why the model cannot generate with a cache, found by tracing it with one; None where it can."""
    surgery = model.surgery
    key = (model.variant(), "generate")
    if key not in surgery.uncached:
        try:
            trace_for_generation(model)
            surgery.uncached[key] = None
        except PeftcError as error:
            surgery.uncached[key] = error.diagnostics[0].message
    return surgery.uncached[key]


def trace_for_generation(model: Any) -> None:
    """Trace the model as `generate` calls it. Raises `PeftcError` E038, E041 where that cannot be."""
    from peftc.runtime.cached import cached_specs, layout_of

    layout = layout_of(model)
    usual = default_inputs(model.skeleton().model)
    accepted = forward_arguments(model.surgery.base_class)
    if not model.config.is_encoder_decoder and "position_ids" in accepted:
        usual["position_ids"] = InputSpec(torch.long, ("batch", "sequence"))
    mask = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    if mask in accepted:
        usual[mask] = InputSpec(torch.long, ("batch", "target" if mask.startswith("decoder") else "sequence"))
    flags = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    model.program_of(cached_specs(model, usual, layout), flags, layout)


def refuse_cache(name: str, reason: str) -> NoReturn:
    """Raise E041 about a model of this class and its cache."""
    fail("E041", f"a {name} keeps no cache: {reason}", help=WITHOUT)


class GraphEncoder(torch.nn.Module):
    """An adapted model's encoder: called, it runs the graph as far as the encoder's last hidden state.

    All else (its config, its parameters) is the base's module.
    """

    def __init__(self, model: Any, module: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_owner"], self.__dict__["_module"] = model, module  # not registered: the model owns both

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from peftc.runtime.cached import encode

        owner, module = self.__dict__["_owner"], self.__dict__["_module"]
        call = read_call(type(module).forward, module.config, args, {**kwargs, "use_cache": None})
        return encode(owner, call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_module"].parameters(*args, **kwargs)
