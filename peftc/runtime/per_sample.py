"""Per-sample states: each row of a batch answered by a state of its own.

    with model.per_sample(["de", "fr", None]):
        model(**batch).logits      # row 0 as "de" alone gives it, row 1 as "fr", row 2 as the base
        model.generate(**batch)

Rows of one state run together, as a smaller batch with that state active. So any rule serves, a prompt or a trained
head too, as much is computed as for one state, and nothing is traced. Invariant: a row is what its state alone makes of
it; what no row has by itself (a loss, a cache) is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from peftc.diagnostics import fail
from peftc.runtime.signature import Call, input_spec, read_call
from peftc.runtime.states import Rows, States


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of one state: their places in the batch."""

    state: str | None
    places: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[torch.tensor(self.places, device=tensor.device)]


def read_rows(states: States, given: Sequence[str | None]) -> Rows:
    """Check what `per_sample` is given. Raises `PeftcError` E047."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        fail("E047", "`per_sample` takes a list: for each row the name of a state, or None", help='`["de", None]`')
    for name in given:
        if name is not None:
            states.get(name)
    return tuple(given)


def _groups(rows: Rows) -> list[_Group]:
    return [_Group(name, tuple(at for at, row in enumerate(rows) if row == name)) for name in dict.fromkeys(rows)]


def answer(
    model: Any, run: Callable[..., Any], own: type[Any], config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `run` with the inputs of each state's rows and put the results together.

    `args` and `kwargs` are those of `forward` of the class `own`, whose config is `config`. Raises `PeftcError` E047
    for what no row has by itself.
    """
    forward, rows = own.forward, model._states.rows
    read = read_call(forward, config, args, kwargs)
    _check(read, rows, config)
    results: list[Any] = []
    parts = _groups(rows)
    for part in parts:
        given = {**_split(read.tensors, part, config), **read.flags, "return_dict": not read.as_tuple}
        if "use_cache" in inspect.signature(forward).parameters:
            given["use_cache"] = False  # the base would answer with one by itself
        with shown(model, part.state):
            results.append(run(**given))
    return _joined(parts, results)


def shown(model: Any, name: str | None) -> Any:
    """A context in which one state answers alone, or (None) the base."""
    states: States = model._states
    return states.shown(model, None if name is None else states.get(name))


def _check(call: Call, rows: Rows, config: Any) -> None:
    if call.cached or call.encoded is not None:
        what = "cache" if call.cached else "`encoder_outputs`"
        fail("E047", f"a call inside per_sample() has no {what}", help="`generate` has one for each state")
    if "labels" in call.tensors:
        message = "inside per_sample() a call takes no `labels`: its loss would be no mean over the batch"
        fail("E047", message, help="compute the loss of the logits; Trainer does with `compute_loss_func`")
    for name, tensor in call.tensors.items():
        if _by_row(name, tensor, config) and tensor.shape[0] != len(rows):
            _refuse_size(name, int(tensor.shape[0]), rows)


def _refuse_size(name: str, size: int, rows: Rows) -> None:
    message = f"per_sample() names the states of {len(rows)} rows, and `{name}` has {size}"
    fail("E047", message, help="give a name, or None for the base, for each row of the batch")


def _by_row(name: str, tensor: torch.Tensor, config: Any) -> bool:
    """Whether the first axis of an input of the model is the batch."""
    sizes = input_spec(name, tensor, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False))).sizes
    return bool(sizes) and sizes[0] == "batch"


def _split(tensors: Mapping[str, torch.Tensor], part: _Group, config: Any) -> dict[str, torch.Tensor]:
    return {name: part.of(tensor) if _by_row(name, tensor, config) else tensor for name, tensor in tensors.items()}


def _joined(parts: Sequence[_Group], results: Sequence[Any]) -> Any:
    """The results of all parts as one, its rows in the order of the batch."""
    flat = [pytree.tree_flatten(result) for result in results]
    if any(spec != flat[0][1] for _, spec in flat):
        fail("E047", "the states of this batch do not answer with the same values", help="call the model once a state")
    order = torch.tensor([place for part in parts for place in part.places]).argsort()
    return pytree.tree_unflatten([_column(leaf, parts, order) for leaf in zip(*(f[0] for f in flat), strict=True)],
                                 flat[0][1])  # fmt: skip


def _column(values: Sequence[Any], parts: Sequence[_Group], order: torch.Tensor) -> Any:
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    for value, part in zip(values, parts, strict=True):
        if value.dim() == 0 or value.shape[0] != len(part.places):
            message = f"per_sample() puts rows together, and a result of shape {list(value.shape)} has none"
            fail("E047", message, help="ask for outputs of single texts alone")
    return torch.cat(list(values))[order.to(values[0].device)]


_ONE_BATCH = ("past_key_values", "streamer", "encoder_outputs")


def generate(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """`generate` for the rows of each state; shorter texts end in padding, as in one batch.

    Raises `PeftcError` E047 for what is of one batch (a cache, a streamer, `return_dict_in_generate`).
    """
    rows: Rows = model._states.rows
    settings = kwargs.get("generation_config") or model.generation_config
    whole = next((name for name in _ONE_BATCH if kwargs.get(name) is not None), None)
    if kwargs.get("return_dict_in_generate", settings.return_dict_in_generate):
        whole = "return_dict_in_generate"
    if whole is not None:
        fail("E047", f"generate() inside per_sample() takes no `{whole}`", help="generate once for each state")
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    tensors |= {"inputs": args[0]} if args and isinstance(args[0], torch.Tensor) else {}
    for name, tensor in tensors.items():
        if tensor.shape[0] != len(rows):
            _refuse_size(name, int(tensor.shape[0]), rows)
    parts = _groups(rows)
    texts = []
    for part in parts:
        given = {**kwargs, **{name: part.of(tensor) for name, tensor in tensors.items()}}
        if kwargs.get("prefix_allowed_tokens_fn") is not None:
            given["prefix_allowed_tokens_fn"] = _of_batch(kwargs["prefix_allowed_tokens_fn"], part)
        with shown(model, part.state):
            texts.append(model.generate(*args[1:] if "inputs" in given else args, **given))
    return _padded(parts, texts, _padding(kwargs, settings, model))


def _of_batch(allowed: Callable[[int, Any], Any], part: _Group) -> Callable[[int, Any], Any]:
    return lambda row, ids: allowed(part.places[row], ids)


def _padding(kwargs: Mapping[str, Any], *settings: Any) -> int:
    """The token that ends a shorter text, as transformers chooses it."""
    sources = [kwargs, *(vars(getattr(source, "generation_config", source)) for source in settings)]
    for name in ("pad_token_id", "eos_token_id"):
        found = next((source[name] for source in sources if source.get(name) is not None), None)
        if found is not None:
            return int(found[0] if isinstance(found, (list, tuple)) else found)
    return 0


def _padded(parts: Sequence[_Group], texts: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    longest = max(text.shape[1] for text in texts)
    whole = [torch.nn.functional.pad(text, (0, longest - text.shape[1]), value=padding) for text in texts]
    several = texts[0].shape[0] // len(parts[0].places)
    order = torch.tensor([place for part in parts for place in part.places]).argsort().to(texts[0].device)
    return torch.cat([text.unflatten(0, (-1, several)) for text in whole])[order].flatten(0, 1)
