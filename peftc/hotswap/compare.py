"""The exported model in onnxruntime against torch: without an adapter the base, with each the model of its deltas.

Of a large base torch's side is run from disk, a weight at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from peftc.diagnostics import PeftcError, fail
from peftc.frontend.trace import InputSpec, build_skeleton
from peftc.hotswap.base import BaseTensors
from peftc.merging.adapted import Adapted
from peftc.merging.certify import Comparison, Inputs, compared
from peftc.merging.comparing import TOLERANCE, batches_for, tensors_of, vocabulary_of, word
from peftc.merging.comparing_onnx import Outputs, in_torch, is_large
from peftc.ort.session import Session
from peftc.pipeline import analyse
from peftc.runtime.streamed import StreamedRun


def compare_session(
    directory: Path, adapters: Mapping[str, Adapted], specs: Mapping[str, InputSpec], texts: Sequence[str]
) -> dict[str, list[Comparison]]:
    """By adapter, "" for none. Raises `PeftcError` E090 where onnxruntime does not run an op at size 0."""
    session, first = Session(directory), next(iter(adapters.values()))
    batches = batches_for(first, specs, texts)
    inputs = [given for _, given in batches]
    found: dict[str, list[Comparison]] = {}
    for name, adapted in {"": first, **adapters}.items():
        if name:
            session.load(name)
        answers = [_run(session, given, name) for given in inputs]
        wanted = in_torch(adapted, specs, inputs) if name else _base(first, specs, inputs)
        adapted.__dict__.pop("model", None)  # one model in memory at a time
        what = f"model.onnx with the adapter {name}" if name else "model.onnx without an adapter"
        found[name] = [
            compared(what, label, given, one, other, TOLERANCE[first.dtype], word(first.dtype), vocabulary_of(first))
            for (label, given), one, other in zip(batches, wanted, answers, strict=True)
        ]
    return found


def _run(session: Session, inputs: Inputs, adapter: str) -> list[torch.Tensor]:
    feeds = {name: inputs[name].numpy() for name in session.inputs}
    try:
        return [torch.from_numpy(value) for value in session.run(feeds, adapter or None).values()]
    except PeftcError as error:
        what = f"the adapter {adapter}" if adapter else "every delta left out"
        reason = error.diagnostics[0].message.partition(": ")[2]
        fail("E090", f"onnxruntime does not run the model with {what}: {reason}", help="export the deltas apart")


def _base(adapted: Adapted, specs: Mapping[str, InputSpec], inputs: Sequence[Inputs]) -> Outputs:
    """What the base answers without deltas."""
    if is_large(adapted):
        skeleton = build_skeleton(adapted.base_class, adapted.skeleton.config, torch.float32)
        return StreamedRun(analyse(skeleton, specs), BaseTensors(adapted), torch.float32)(inputs)
    model = adapted.base_model()
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return [tensors_of(model(**{name: given[name] for name in specs}, **extra)) for given in inputs]
