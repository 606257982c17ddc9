"""Serving with onnxruntime: one session of a base, and adapters that are chosen at each call.

    session = peftc.ort.Session("served")       # what `peftc merge DIR... --export onnx --adapters -o served` wrote
    session.load("out-de")
    session.run({"input_ids": ids, "attention_mask": mask}, adapter="out-de")["logits"]

Neither torch nor transformers is imported.
"""

from peftc.ort.adapters import Adapter, read_adapter
from peftc.ort.session import Session

__all__ = ["Adapter", "Session", "read_adapter"]
