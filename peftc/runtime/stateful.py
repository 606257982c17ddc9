"""`HoldsStates`: what a `GraphModel` does with several states; see `peftc.runtime.states`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.diagnostics import fail
from peftc.runtime.states import States


class HoldsStates:
    """Mixed into `GraphModel`: add, choose and leave out states."""

    _states: States
    _surgery: Any

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the model's states; the first one is called "default"."""
        return tuple(self._states.by_name)

    @property
    def active(self) -> str | None:
        """The name of the state that answers and trains; None inside `disable()`."""
        return None if self._states.bare else self._states.active.name

    def add(self, name: str, directory: str | Path) -> None:
        """Add the deltas of a directory as a state called `name`, made on the same base; the active one stays active.

        Raises `PeftcError`: E034, E035, E040 as `peftc.load` does; E047, a name that is taken or cannot be used, or
        deltas for another head.
        """
        from peftc.runtime.adding import add_state

        add_state(self, name, directory)

    def remove(self, name: str) -> None:
        """Forget a state and its tensors. Raises `PeftcError` E047 for the active one."""
        states = self._states
        state = states.get(name)
        self._outside("removed", name)
        if state is states.active:
            fail("E047", f"`{name}` is the active state", help="make another one active, then remove it")
        states.forget(state)

    def set_active(self, name: str) -> None:
        """Let the model answer and train with this state, and no other one train.

        Which of its parameters require a gradient is as it was when it was last active; at first, as its rule says.
        Nothing is copied and nothing traced. Run `backward` before a switch: parameters that do not train any more get
        no gradient. Raises `PeftcError` E047.
        """
        states = self._states
        state = states.get(name)
        self._outside("made active", name)
        before = states.active
        if state is not before:
            states.train(state, before)
            states.seat(state)
            self._surgery = state.surgery

    def _outside(self, done: str, name: str) -> None:
        """Raise E047 inside a block that has chosen states."""
        states = self._states
        block = "disable" if states.bare else "per_sample" if states.rows is not None else ""
        block = block or ("mix" if states.mixed is not None else "")
        if block:
            fail("E047", f"`{name}` cannot be {done} inside {block}()", help="leave the block first")

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, the model is its base: the base's own code runs, on the base's own tensors, in `generate` too."""
        self._have_base()
        with self._states.shown(self, None):
            yield

    def _have_base(self) -> None:
        if not self._states.whole:
            from peftc.runtime.adding import keep_base

            keep_base(self, self._states)

    @contextlib.contextmanager
    def per_sample(self, states: Sequence[str | None]) -> Iterator[None]:
        """Inside, each row of a batch is answered by the state of its place in `states`, or (None) by the base.

        Calls and `generate` take batches of as many rows. The states train as each does when it is active, so run
        `backward` inside. Nothing is traced; see `peftc.runtime.per_sample`. Raises `PeftcError` E047 for a state that
        is not there and, in a call, for what no row has by itself: `labels`, a cache.
        """
        from peftc.runtime.per_sample import read_rows

        own = self._states
        rows = read_rows(own, states)
        if None in rows:
            self._have_base()
        before, own.rows = own.rows, rows
        try:
            with own.training({name for name in rows if name is not None}):
                yield
        finally:
            own.rows = before

    @contextlib.contextmanager
    def mix(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Inside, the model answers with several states together, each weighted: `{"de": 0.7, "fr": 0.3}`.

        Every value h that a delta changes becomes h + Σ w (h' - h), h' being what a state makes of it, and so does
        every base tensor that a rule trains; see `peftc.passes.mix`. The states train as each does when it is active,
        so run `backward` inside. A set of states is traced once, whatever the weights. Raises `PeftcError` E047 for a
        state that is not there, E048 for one whose deltas change no value alone (prompts, `rewrite`, `carry`).
        """
        from peftc.runtime.mixing import mixture

        own = self._states
        self._outside("mixed", ", ".join(map(str, weights)))
        mixed = mixture(own, weights)
        self._have_base()
        surgery, own.mixed, self._surgery = self._surgery, mixed, mixed.surgery
        try:
            with own.training(weights):
                yield
        finally:
            own.mixed, self._surgery = None, surgery

    @contextlib.contextmanager
    def saved_state(self, name: str | None) -> Iterator[None]:
        """Inside, `name` (None: the active state) stands where a save reads. Raises `PeftcError` E047, E048."""
        states = self._states
        if name is None and states.mixed is not None:
            fail("E048", "a mixture is no set of deltas of one rule", help="save its states: `state=...`")
        state = states.active if name is None else states.get(name)
        with states.shown(self, state):
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; see `peftc.runtime.generation` for what a graph does of it."""
        if self._states.rows is not None:
            from peftc.runtime import per_sample

            return per_sample.generate(self, args, kwargs)
        base: Any = self._surgery.base_class if self._states.bare else super()
        return base.generate(self, *args, **kwargs) if self._states.bare else base.generate(*args, **kwargs)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder, with the deltas of the active state, or inside `disable()` the base's."""
        if self._states.rows is not None:
            fail("E047", "inside per_sample() the encoder is not called by itself", help="call the whole model")
        if self._states.bare:
            return self._surgery.base_class.get_encoder(self, *args, **kwargs)
        base: Any = super()
        return base.get_encoder(*args, **kwargs)

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model."""
        if self._states.rows is not None:
            from peftc.runtime import per_sample

            own: Any = self
            return per_sample.answer(own, own.forward, self._surgery.base_class, own.config, args, kwargs)
        if self._states.bare:
            return self._surgery.base_class.forward(self, *args, **kwargs)
        model: Any = self
        return model._run(args, kwargs)

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What a save leaves out; the Trainer, which resumes from what was saved, then misses no frozen tensor."""
        plan, model = self._surgery.plan, self
        return set(model.state_dict()) - {*plan.parameters, *plan.trained}  # pyright: ignore[reportAttributeAccessIssue]
