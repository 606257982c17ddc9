"""`Session`: a model whose deltas are optional inputs, with its adapters, for requests that each choose one.

A session may be shared by threads: a run takes the adapters it names when it begins and holds them to its end, so that
one may be replaced or unloaded meanwhile.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peftc.diagnostics import did_you_mean, fail
from peftc.ort.adapters import SUFFIX, Adapter, ort_errors, read_adapter

if TYPE_CHECKING:
    import numpy as np

MODEL, INDEX = "model.onnx", "adapters.json"
NUMBER = "peftc.model_number"
"""The key of the model's metadata under which its number stands."""


class Session:
    """An onnxruntime session of `directory` and the adapters that were loaded into it.

    `options` and `providers` are onnxruntime's own. Raises `PeftcError` E091 for a directory that holds no model with
    optional deltas.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        options: Any = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ) -> None:
        import onnxruntime

        self.directory = Path(directory)
        model = self.directory / MODEL
        if not model.is_file():
            fail("E091", f"{self.directory} holds no {MODEL}", help="`peftc merge --export onnx --adapters` makes one")
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # it warns of each input with a default, which here is the purpose
        self._session = onnxruntime.InferenceSession(str(model), options, providers=list(providers))
        number = self._session.get_modelmeta().custom_metadata_map.get(NUMBER)
        if number is None or not number.isdigit():
            help = "export it with `--adapters`; a merged model has its deltas inside and takes none"
            fail("E091", f"{model} has no optional deltas", help=help)
        self._number = int(number)
        optional = self._session.get_overridable_initializers()
        self._optional = {value.name: value for value in optional}
        self.inputs = tuple(value.name for value in self._session.get_inputs() if value.name not in self._optional)
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self._lock = threading.Lock()
        self._adapters: dict[str, Adapter] = {}

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the adapters that lie in the directory; `load(name)` loads them."""
        index = self.directory / INDEX
        if not index.is_file():
            return ()
        try:
            return tuple(json.loads(index.read_text(encoding="utf-8"))["adapters"])
        except (OSError, ValueError, KeyError, TypeError):
            fail("E091", f"{index} cannot be read", help="export the directory again")

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names that `run` takes."""
        with self._lock:
            return tuple(self._adapters)

    def load(self, name: str, path: str | Path | None = None) -> None:
        """Load an adapter file as `name` (default: the one of this name in the directory); it replaces one so called.

        Raises `PeftcError` E091: no whole adapter file, of another base, or not for the inputs of this model.
        """
        if path is None and not (self.directory / f"{name}{SUFFIX}").is_file():
            help = did_you_mean(name, self.available) or "give the path of an adapter file"
            fail("E091", f"{self.directory} holds no adapter `{name}`", help=help)
        adapter = read_adapter(path if path is not None else self.directory / f"{name}{SUFFIX}")
        self._check(adapter)
        with self._lock:
            self._adapters[name] = adapter

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that use it end with it. Raises `PeftcError` E092."""
        with self._lock:
            if self._adapters.pop(name, None) is None:
                self._refuse_unknown(name)

    def run(
        self,
        inputs: Mapping[str, Any],
        adapter: str | Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The outputs by name, with one adapter, several of different structures (each on what the others make), or
        none, which is the base.

        Raises `PeftcError` E092: an adapter that is not loaded, two that name one input, inputs that do not fit.
        """
        import numpy as np
        import onnxruntime

        names = [adapter] if isinstance(adapter, str) else list(adapter or ())
        with self._lock:
            chosen = {
                name: self._adapters[name] if name in self._adapters else self._refuse_unknown(name) for name in names
            }
        _refuse_clash(chosen)
        options = onnxruntime.RunOptions()
        for held in chosen.values():
            options.add_active_adapter(held.handle)
        self._check_inputs(inputs)
        feeds = {name: np.asarray(value) for name, value in inputs.items()}
        wanted = list(self.outputs if outputs is None else outputs)
        for name in wanted:
            if name not in self.outputs:
                fail("E092", f"the model has no output `{name}`", help=did_you_mean(name, self.outputs))
        try:
            values: Any = self._session.run(wanted, feeds, options)
        except ort_errors() as error:
            fail("E092", f"onnxruntime refuses the inputs: {str(error).splitlines()[0]}", help=self._told(feeds))
        finally:
            del options  # before the adapters that it points to
        return dict(zip(wanted, values, strict=True))

    def run_with_iobinding(self, *_: object, **__: object) -> NoReturn:
        """Refused, for onnxruntime leaves adapters out of such a run without a word. Raises `PeftcError` E092."""
        fail("E092", "onnxruntime ignores adapters in `run_with_iobinding`", help="use `run`")

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        missing = [name for name in self.inputs if name not in inputs]
        extra = [name for name in inputs if name not in self.inputs]
        if missing:
            fail("E092", f"the input `{missing[0]}` is missing", help=f"the model takes {', '.join(self.inputs)}")
        if extra:
            help = "a delta comes from a loaded adapter" if extra[0] in self._optional else None
            fail("E092", f"the model has no input `{extra[0]}`", help=help or did_you_mean(extra[0], self.inputs))

    def _told(self, feeds: Mapping[str, Any]) -> str:
        return "; ".join(f"{name} is {array.dtype} {list(array.shape)}" for name, array in feeds.items())

    def _refuse_unknown(self, name: str) -> NoReturn:
        help = did_you_mean(name, self._adapters) or "load it first: session.load(name, path)"
        fail("E092", f"no adapter `{name}` is loaded", help=help)

    def _check(self, adapter: Adapter) -> None:
        """Refuse what onnxruntime would take without a word, or only at the first run."""
        if adapter.model != self._number:
            help = "export it again together with this model"
            fail("E091", f"{adapter.path} was made for another base than {self.directory}", help=help)
        sizes: dict[str, int] = {}
        for name, shape in adapter.shapes.items():
            if name not in self._optional:
                help = "export the deltas and the model together, so that the model has inputs for them"
                fail("E091", f"{adapter.path} names `{name}`, which the model has no input for", help=help)
            wanted = self._optional[name]
            fits = wanted.type == adapter.dtypes[name] and len(shape) == len(wanted.shape)
            pairs = zip(wanted.shape, shape, strict=True) if fits else ()
            if not fits or any(
                sizes.setdefault(str(size), found) != found if isinstance(size, str) else size != found
                for size, found in pairs
            ):
                found = f"{adapter.dtypes[name]} {list(shape)}"
                fail("E091", f"{adapter.path}: `{name}` is {found}, the model takes {wanted.type} {list(wanted.shape)}")


def _refuse_clash(chosen: Mapping[str, Adapter]) -> None:
    owners: dict[str, str] = {}
    for name, adapter in chosen.items():
        for parameter in adapter.shapes:
            other = owners.setdefault(parameter, name)
            if other != name:
                help = "onnxruntime would take the first and drop the other; run them apart"
                fail("E092", f"the adapters `{other}` and `{name}` both name `{parameter}`", help=help)
