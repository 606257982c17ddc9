"""Why a family misses, in words: the raw reason of a record sorted under one of a few causes.

cause("does not build: ImportError: X requires the timm library")   # "needs a package that is not installed"
told("attention: 0 of 2 found")     # "attentions that are not found as sites (attention: 0 of 2 found)"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from peftc.survey.record import Record

CAUSES: tuple[tuple[str, str], ...] = (
    (r"requires the \w+ library|No module named", "needs a package that is not installed"),
    (r"not enough memory|can't allocate memory|out of memory", "computes buffers of over 12 GiB at any size"),
    (r"no default config|none of the heads", "transformers offers no model for its default config"),
    (r"does not build", "does not build from a small config"),
    (r"not run: [\d,]+ parameters", "cannot be made small: traced, but no rule was run"),
    (r"not done after", "took longer than the bound on time"),
    (r"missing \d+ required|You have to specify|must be (given|provided)|must specify|NoneType' object|_unimplemented"
     r"|labels must be|got an unexpected keyword|cannot be `None`|is required", "needs inputs that are not derived"),
    (r"data-dependent|nonzero|without output_size|unhinted", "branches on values of tensors, which no trace follows"),
    (r"makes the constants", "makes constants from its weights' device, which are not there in a trace"),
    (r"cannot trace|crash in trace", "cannot be traced for another reason of its code or small config"),
    (r"^attention: ", "attention sites differ from the class names"),
    (r"^ffn: ", "FFN sites differ from the class names"),
    (r"draws random", "draws random numbers in evaluation, so that no other runtime can equal it"),
    (r"does not run", "the traced graph does not run"),
    (r"onnxruntime|onnx|ONNX|SpecViolation|Conversion", "the adapted graph does not get through ONNX"),
    (r"get no gradient|no gradient reaches|no output depends", "a delta gets no gradient"),
    (r"differs from its base|other shapes", "the adapted model differs from its base at the start"),
    (r"^(mam|lora|houlsby)", "a rule does not apply"),
)  # fmt: skip
"""A pattern of raw reasons, and what it means. The first that holds."""


def cause(reason: str) -> str:
    """The cause that a raw reason is counted under."""
    return next((words for pattern, words in CAUSES if re.search(pattern, reason)), "another reason")


def told(reason: str) -> str:
    """A raw reason behind its cause."""
    return f"{cause(reason)} ({reason})"


def counted(records: Iterable[Record]) -> dict[str, int]:
    """In how many families each cause occurs, the most frequent first."""
    return dict(Counter(name for record in records for name in {*map(cause, record.reasons)}).most_common())
