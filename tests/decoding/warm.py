"""Imported once by the server that processes are forked from: all imports, and one small trace.

The first trace of a process costs several times what the next one does (torch reads its decompositions, sympy is
imported), so that a family costs seconds only in a process that starts behind it.
"""

from __future__ import annotations

import gc

import torch

from decoding.measure import measure

torch.set_num_threads(1)
measure("gpt2", "causal-lm")
measure("bart", "seq2seq-lm")
gc.collect()
gc.freeze()
