"""What the server imports that forks the measuring processes: one small model is measured here, so that no process
imports transformers, the exporters and onnxruntime, or fills the tables of torch anew (a third of its time).

One thread, and no gradient: what a library of threads started in a parent is not there in its children, and autograd
of a torch that is built for CUDA starts threads with its first gradient.
"""

from __future__ import annotations

import os

import torch

from peftc.frontend.trace import quiet
from peftc.survey.measure import measure

torch.set_num_threads(1)
os.environ["PEFTC_CACHE"] = "off"  # hundreds of traces that nobody asks for again
with quiet():
    measure("bert", gradients=False, onnx=True)
