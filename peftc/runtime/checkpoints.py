"""Checkpoints of a training run: the newest one that is whole.

The Trainer writes a checkpoint file by file, its state last. A run that is killed meanwhile leaves a `checkpoint-N`
without the end, which transformers' own `resume_from_checkpoint=True` takes for the newest.

    trainer.train(resume_from_checkpoint=peftc.last_checkpoint("runs"))  # None where there is none: from the start
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Final

from peftc.diagnostics import PeftcError
from peftc.runtime.delta_dir import DeltaDir

_NAME: Final = re.compile(r"checkpoint-(\d+)")
_STATE: Final = "trainer_state.json"


def last_checkpoint(directory: str | Path) -> str | None:
    """The path of the newest whole checkpoint in `directory`, the Trainer's `output_dir`; None where there is none.

    Whole is one whose deltas open, whose other files are not cut short, and whose state, which the Trainer writes last,
    is that of its step.
    """
    directory = Path(directory)
    found = [] if not directory.is_dir() else [entry for entry in directory.iterdir() if _NAME.fullmatch(entry.name)]
    newest_first = sorted(found, key=_step, reverse=True)
    return next((str(entry) for entry in newest_first if _whole(entry)), None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        DeltaDir.open(checkpoint)
    except (OSError, ValueError, PeftcError):
        return False
    archives = all(zipfile.is_zipfile(file) for file in checkpoint.glob("*.pt*"))  # a crash of the machine cuts them
    return archives and isinstance(state, dict) and state.get("global_step") == _step(checkpoint)
