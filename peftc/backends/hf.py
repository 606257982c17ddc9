"""The transformers backend: a plain checkpoint that `from_pretrained` loads without peftc.

It is planned first (which tensor is copied, folded or added, into which shard) and then streamed: bytes that no delta
names are copied, folded tensors go through memory a block at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.backends.settings import Settings
from peftc.backends.widened import Padding, widened_config
from peftc.diagnostics import Diagnostic, PeftcError, fail
from peftc.fold.stream import BLOCK, TensorChange, by_rows, whole
from peftc.store.keys import KeyMap, key_map
from peftc.store.safetensors_io import TensorSpec, dtype_code, torch_dtype
from peftc.store.shards import Piece, Produce, Shard, resharded, same_layout, write_shards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from peftc.fold.decide import Decision
    from peftc.fold.state import FoldedState
    from peftc.fold.updates import Factors
    from peftc.frontend.trace import Skeleton
    from peftc.ir.program import Program
    from peftc.store.model_dir import ModelDir

name = "hf"


def refuse_kept(decisions: list[Decision]) -> None:
    """A plain checkpoint holds no delta: name every one that stays, its node and the reason. Raises E037."""
    staying: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        if not decision.folds:
            staying.setdefault((decision.insertion.delta, decision.reason), []).append(decision)
    if staying:
        raise PeftcError(
            Diagnostic(
                "E037",
                f"delta `{delta}` stays in the graph at {group[0].where}"
                + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                + f" (node {group[0].node}): {reason}",
                help=_remedy(reason),
            )
            for (delta, reason), group in staying.items()
        )


def _remedy(reason: str) -> str:
    if " is tied" in reason:
        return (
            "`--tied untie` writes two tensors, `--tied both` changes the one; `--export onnx` keeps it as a subgraph"
        )
    return "a plain transformers checkpoint cannot hold it; `--export onnx` keeps it as a subgraph"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was written: how many tensors were touched, copied and added, and the record of each that was not copied."""

    changed: int
    copied: int
    added: int
    config: PreTrainedConfig
    changes: tuple[TensorChange, ...] = ()

    def describe_rounding(self) -> str:
        """How much of the changes the stored dtype could not hold."""
        known = [change for change in self.changes if change.change > 0]
        if not known:
            return "no tensor of the base was changed in place"
        worst = max(known, key=lambda change: change.rounding / change.change)
        if worst.rounding == 0:
            return f"changes are stored as they were computed, in {worst.dtype}"
        share = 100 * worst.rounding / worst.change
        return f"rounding to {worst.dtype}: at most {share:.2g} % of a tensor's change, at {worst.name}"


def plan_checkpoint(
    *,
    source: ModelDir,
    skeleton: Skeleton,
    program: Program,
    decisions: list[Decision],
    folded: FoldedState,
    trained: Collection[str] = (),
    max_shard: int | None = None,
    settings: Settings | None = None,
) -> CheckpointPlan:
    """What to write, with nothing read but headers.

    `folded` gives every tensor of the folded model; `trained` are base tensors that the rule trained as they are.
    Shards are laid out as the base's, or of at most `max_shard` bytes. `settings` are those under which the class has
    parameters that it lacks. Raises `PeftcError` E037 when the checkpoint
    has no place for a tensor that changes.
    """
    settings = settings or Settings()
    config, padding = widened_config(skeleton, program, decisions)
    config = settings.applied(config)
    names = key_map(skeleton.model, source.shapes())
    touched = {*folded.touched, *trained, *padding}
    _refuse_converted(names.converted, touched)
    tensors = _Tensors(source, names, folded, frozenset(trained), padding, touched, settings.apart)
    pieces = {key: tensors.piece(key) for key in source.tensors if key not in names.mismatched}
    added = [Piece(tensors.head(state)) for state in (*names.missing, *names.mismatched)]
    added += [Piece(tensors.copy(state)) for state in tensors.own]
    code = dtype_code(skeleton.model.dtype)
    added += [Piece(TensorSpec(name, code, shape)) for name, shape in settings.zeros.items()]
    if max_shard is None:
        shards = same_layout(source.headers, pieces, added)
    else:
        metadata = dict(source.headers[0].metadata) or {"format": "pt"}
        shards = resharded([*pieces.values(), *added], max_shard, metadata)
    return CheckpointPlan(source, shards, config, tensors, len(added))


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """The shards to be written and where each tensor of them comes from."""

    source: ModelDir
    shards: list[Shard]
    config: PreTrainedConfig
    tensors: _Tensors
    added: int
    """How many tensors the base does not hold."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def working_set(self) -> int:
        """About how many bytes the largest fold needs at once."""
        return max((self.tensors.working_set(p) for s in self.shards for p in s.pieces if p.source is None), default=0)

    def write(self, directory: Path, progress: Callable[[int, int], None] | None = None) -> Checkpoint:
        """Write config, tokenizer and folded shards into `directory`. Raises `PeftcError` E031, E042; `OSError`."""
        changes: list[TensorChange] = []
        self.source.copy_support_files(directory)
        self.config.save_pretrained(directory)
        with _one_thread():
            write_shards(directory, self.shards, self._produce(changes.append), progress)
        produced = [piece for shard in self.shards for piece in shard.pieces]
        copied = sum(piece.source is not None for piece in produced)
        changed = len(produced) - copied - self.added
        place = {piece.spec.name: number for number, piece in enumerate(produced)}
        changes.sort(key=lambda change: place[change.name])
        return Checkpoint(changed, copied, self.added, self.config, tuple(changes))

    def _produce(self, done: Callable[[TensorChange], None]) -> Produce:
        return lambda spec: self.tensors.blocks(spec, done)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are small, and several tensors are folded side by side: threads of torch would wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(slots=True)
class _Tensors:
    """The tensors of the new checkpoint by the names of the old one.

    A parameter with two names (tied weights) may be stored under one of them, or under both, and be changed under the
    other: `changed` says for every stored name that changes which state-dict name holds the new value.
    """

    source: ModelDir
    names: KeyMap
    folded: FoldedState
    trained: frozenset[str]
    padding: Mapping[str, Padding]
    touched: set[str]
    apart: frozenset[str] = frozenset()
    """Tied names that the new checkpoint takes apart."""
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    changed: dict[str, str] = field(init=False)
    own: dict[str, str] = field(init=False)
    """Names that become tensors of their own, and the stored tensor that each is made from."""

    def __post_init__(self) -> None:
        tied, keys = self.names.tied, self.names.state_to_checkpoint
        self.own = {state: keys[owner] for state, owner in tied.items() if self.apart & {state, owner}}
        aliases = [*tied.items(), *self.names.stored_twice.items()]
        aliases = [pair for pair in aliases if not self.apart.intersection(pair)]
        holder = {state: state for state in self.touched}
        for state, owner in aliases:
            for one, other in ((state, owner), (owner, state)):
                if one in self.touched:
                    holder.setdefault(other, one)
        stored = self.names.state_to_checkpoint.items()
        self.changed = {key: holder[state] for state, key in stored if state in holder}

    def piece(self, key: str) -> Piece:
        """A stored tensor in the new checkpoint."""
        header, info = self.source.tensors[key]
        state = self.changed.get(key)
        if state is None:
            return Piece(TensorSpec(key, info.dtype, info.shape), header)
        shape = self.folded.shape(state, info.shape)
        shape = self.padding[state].shape(shape) if state in self.padding else shape
        return Piece(TensorSpec(key, info.dtype, shape))

    def head(self, state: str) -> TensorSpec:
        """A tensor of a head that the base does not store, or stores in another shape, by its state-dict name."""
        tensor = self.folded.unfolded(state)
        shape = self.folded.shape(state, tuple(tensor.shape))
        return TensorSpec(state, dtype_code(tensor.dtype), shape)

    def copy(self, state: str) -> TensorSpec:
        """A tied name as a tensor of its own."""
        info = self.source.tensors[self.own[state]][1]
        return TensorSpec(state, info.dtype, self.folded.shape(state, info.shape))

    def blocks(self, spec: TensorSpec, done: Callable[[TensorChange], None]) -> Iterator[memoryview]:
        """The bytes of a tensor that is not copied; of those that are folded whole one is in memory at a time."""
        key = spec.name
        source = self.own.get(key)
        state = self.changed.get(key)
        if source is not None and key not in self.trained and self.folded.by_rows(key):
            yield from by_rows(self.source.tensors[source][0], source, self.folded, key, done, key)
        elif state is not None and self._goes_by_rows(key, state):
            yield from by_rows(self.source.tensors[key][0], key, self.folded, state, done)
        else:
            with self.one_at_a_time:
                header = None if state is None else self.source.tensors[key][0]
                yield from whole(header, key, self._exact(state or key), torch_dtype(spec.dtype), done)

    def factors(self, key: str) -> Factors | None:
        """The change of a stored tensor as a product of two factors, where it is one; see `FoldedState.factors`."""
        state = self.changed.get(key)
        if state is None or not self._goes_by_rows(key, state):
            return None
        return self.folded.factors(state, self.source.tensors[key][1].shape)

    def working_set(self, piece: Piece) -> int:
        key = piece.spec.name
        state = self.changed.get(key)
        if key in self.own and self.folded.by_rows(key):
            return BLOCK * 4 * 4
        elements = piece.spec.nbytes // max(1, torch_dtype(piece.spec.dtype).itemsize)
        if state is not None and self._goes_by_rows(key, state):
            elements = min(elements, BLOCK)
        return elements * 4 * 4

    def _goes_by_rows(self, key: str, state: str) -> bool:
        own = self.names.state_to_checkpoint.get(state) == key and state not in self.trained
        whole_shape = bool(self.source.tensors[key][1].shape) and state not in self.padding
        return own and whole_shape and state in self.folded.touched and self.folded.by_rows(state)

    def _exact(self, state: str) -> torch.Tensor:
        tensor = self.folded.exact(state)
        return self.padding[state].apply(tensor) if state in self.padding else tensor


def _refuse_converted(converted: Mapping[str, Any], touched: set[str]) -> None:
    blocked = sorted(touched & set(converted))
    if blocked:
        fail(
            "E037",
            f"{blocked[0]} is not stored as such in the checkpoint: it is {converted[blocked[0]].reason}",
            help="use `--export onnx`, or merge into a base that is stored as transformers holds it: "
            "model.save_pretrained(DIR, save_original_format=False)",
        )
