"""Train, save, kill -9, resume, in a loop: nothing may be lost or corrupt.

    python tests/soak.py 30          # minutes
    python tests/soak.py 30 --seed 7

Children train one and the same run with transformers' Trainer, a checkpoint every other step, the newest three kept,
and are killed while they load, in a step, in a save or while an old checkpoint is deleted. What is compared, bit for
bit, with a run that nobody disturbed: of the newest whole checkpoint (`peftc.last_checkpoint`) the deltas, optimizer,
scheduler, random states and the Trainer's state with all its logged losses; of every other checkpoint, half-written
or half-deleted, that it is refused or that its deltas are right. No step that was whole once may be lost, the base's
files must stay what they are, and a run that came to its end must leave no temporary file. Exit code 1 at the first
difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

STEPS, EVERY, KEEP = 24, 2, 3
WIDTH = 4096
"""So wide that a save takes some milliseconds."""
IMPORTED = ["torch", "transformers", "transformers.trainer", "peftc.runtime.api", "peftc.runtime.checkpoints"]
PLANS = ("loading", "training", "saving", "saving", "saving", "deleting")
WRITTEN = ("", "delta.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
"""What a save puts down one after the other; a kill may wait for one of them."""
FRESH_EVERY = 8
"""Every so many children are a new interpreter; the others are forked from a process that has imported, to be many."""


def prepare(base: Path) -> None:
    """A tiny BERT with dropout on disk."""
    import torch
    import transformers
    from runtime.tiny import MAKERS

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    MAKERS["bert"]().save_pretrained(base)


def child(base: Path, out: Path, mark: Path, keep: int | None) -> None:
    """Train up to `STEPS` from the newest whole checkpoint in `out`; `mark` appears when training begins."""
    import torch
    import transformers
    from runtime.tiny import batch

    import peftc

    class Marks(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            mark.touch()

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resume = peftc.last_checkpoint(out)
    torch.manual_seed(time.time_ns())  # what the child starts from must not matter
    model = peftc.load(resume, base) if resume else peftc.apply("mam", base, set={"l": 3, "r": WIDTH})
    rows = {**batch(24, 30), "labels": torch.arange(24) % 3}
    data = [{name: value[index] for name, value in rows.items()} for index in range(24)]
    arguments = transformers.TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=EVERY,
        save_total_limit=keep, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3, report_to=[],
        logging_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Marks()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


def contents(checkpoint: Path) -> dict[str, Any]:
    """All that a run is continued from: deltas, optimizer, scheduler, random states, the Trainer's own state."""
    import torch
    from safetensors.torch import load_file

    def of(name: str) -> Any:
        return torch.load(checkpoint / name, weights_only=False)  # the random state is numpy's, and this run wrote it

    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]
    return {
        "deltas": load_file(checkpoint / "delta.safetensors"),
        "optimizer": of("optimizer.pt"),
        "scheduler": of("scheduler.pt"),
        "random": of("rng_state.pth"),
        "state": state,
    }


def difference(one: Any, other: Any, path: str = "") -> str:
    """Where two nests of tensors differ; "" where they are equal bit for bit."""
    import numpy as np
    import torch

    if type(one) is not type(other):
        return path
    if isinstance(one, torch.Tensor):
        return "" if one.dtype == other.dtype and torch.equal(one, other) else path
    if isinstance(one, np.ndarray):
        return "" if np.array_equal(one, other) else path
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return path
        return next((found for key in one if (found := difference(one[key], other[key], f"{path}/{key}"))), "")
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return path
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for at, pair in pairs if (found := difference(*pair, f"{path}/{at}"))), "")
    return "" if one == other else path


def files_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below `directory` with its size and time."""
    found = {}
    for file in directory.rglob("*"):
        try:
            status = file.stat()
        except FileNotFoundError:  # deleted meanwhile
            continue
        found[str(file.relative_to(directory))] = (status.st_size, status.st_mtime_ns)
    return found


def checkpoints(out: Path) -> dict[int, Path]:
    return {int(entry.name.rpartition("-")[2]): entry for entry in out.glob("checkpoint-*")}


def wait(process: Any, out: Path, mark: Path, draw: random.Random) -> None:
    """Until the moment to kill has come, of a plan that is drawn; or the process has ended."""
    plan, before = draw.choice(PLANS), set(checkpoints(out))
    nth, file, late = draw.randint(1, 3), draw.choice(WRITTEN), draw.random()

    def come() -> bool:
        now = set(checkpoints(out))
        fresh = sorted(now - before)
        if plan == "deleting":
            return bool(fresh) and len(now) > KEEP and (out / f"checkpoint-{fresh[-1]}" / WRITTEN[-1]).exists()
        return len(fresh) >= nth and (out / f"checkpoint-{fresh[-1]}" / file).exists()

    if plan == "loading":
        time.sleep(1.5 * late)
        return
    until = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < until and not (mark.exists() if plan == "training" else come()):
        time.sleep(0.0003)
    time.sleep(late * {"training": 2.0, "saving": draw.choice((0.001, 0.02)), "deleting": 0.001}[plan])


@dataclass
class Soak:
    """The state of the loop: what was whole last, and what has been counted."""

    folder: Path
    draw: random.Random
    known: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    saves: Counter[str] = field(default_factory=Counter)
    """Kills in a save by the last thing that it had put down."""

    def __post_init__(self) -> None:
        self.base, self.reference, self.out = (self.folder / name for name in ("base", "reference", "run"))
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(IMPORTED)

    def start(self, out: Path, mark: Path, keep: int | None, *, fresh: bool) -> Any:
        context = multiprocessing.get_context("spawn") if fresh else self.forks
        process = context.Process(target=child, args=(self.base, out, mark, keep))
        process.start()
        return process

    def once(self) -> str:
        """One child, killed or not, and what is wrong after it; "" where nothing is."""
        self.out.mkdir(exist_ok=True)
        mark = self.folder / "training"
        mark.unlink(missing_ok=True)
        before = files_of(self.out)
        self.counts["children"] += 1
        process = self.start(self.out, mark, KEEP, fresh=self.counts["children"] % FRESH_EVERY == 0)
        wait(process, self.out, mark, self.draw)
        process.kill()
        process.join()
        if process.exitcode not in (0, -9):
            return f"a child failed with {process.exitcode} from step {self.known}"
        phase = "not killed, came to its end" if process.exitcode == 0 else "killed " + self.phase(before, mark)
        self.counts[phase] += 1
        wrong = self.check()
        print(f"{time.strftime('%H:%M:%S')} {phase}; step {self.known}", flush=True)
        if not wrong and self.known == STEPS:
            wrong = self.finish()
        return wrong

    def phase(self, before: dict[str, tuple[int, int]], mark: Path) -> str:
        """When the child was killed, as the files tell."""
        import peftc

        newest = int((peftc.last_checkpoint(self.out) or "-0").rpartition("-")[2])
        now = files_of(self.out)
        touched = {name: stamp for name, stamp in now.items() if before.get(name) != stamp and "/" in name}
        half = {name: stamp for name, stamp in touched.items() if _step(name) > newest}
        if half or any(step > newest and str(path.name) not in before for step, path in checkpoints(self.out).items()):
            last = max(half, key=lambda name: half[name][1], default="")
            self.saves["the deltas begun" if ".peftc-" in last else Path(last).name or "the directory"] += 1
            return "in a save"
        gone = [name for name in before.keys() - now.keys() if "/" in name and ".peftc-" not in name]
        if any(_step(name) in checkpoints(self.out) for name in gone):
            return "while a checkpoint was deleted"
        return "in training" if mark.exists() else "while loading"

    def check(self) -> str:
        """What is wrong: a step that was lost, a value that differs, a half checkpoint that opens wrong."""
        import peftc

        newest = peftc.last_checkpoint(self.out)
        step = int(newest.rpartition("-")[2]) if newest else 0
        if step < self.known:
            return f"step {self.known} was there and {step} is the newest now"
        self.known = step
        for at, path in checkpoints(self.out).items():
            wrong = self.whole(path) if at == step else self.half(path)
            if wrong:
                return f"step {at} differs from the undisturbed run at {wrong}"
        return ""

    def whole(self, path: Path) -> str:
        self.counts["whole checkpoints compared"] += 1
        return difference(contents(path), contents(self.reference / path.name))

    def half(self, path: Path) -> str:
        """A checkpoint that need not be whole: refused, or its deltas are right."""
        from safetensors.torch import load_file

        from peftc.diagnostics import PeftcError
        from peftc.runtime.delta_dir import DeltaDir

        try:
            deltas = DeltaDir.open(path).tensors()
        except PeftcError:
            self.counts["half checkpoints refused"] += 1
            return ""
        self.counts["older or half checkpoints right"] += 1
        return difference(deltas, load_file(self.reference / path.name / "delta.safetensors"), "deltas")

    def finish(self) -> str:
        """A run has come to its end: what it left behind that it should not have; then the next one begins."""
        self.counts["runs to the end"] += 1
        left = [name for name in files_of(self.out) if ".peftc-" in name and _step(name) == STEPS]
        shutil.rmtree(self.out)
        self.known = 0
        return f"left behind: {left}" if left else ""

    def run(self, minutes: float) -> str:
        prepare(self.base)
        first = hashes(self.base)
        undisturbed = self.start(self.reference, self.folder / "first", None, fresh=True)
        undisturbed.join()
        if undisturbed.exitcode != 0:
            return "the undisturbed run failed"
        end, wrong = time.monotonic() + 60 * minutes, ""
        while not wrong and time.monotonic() < end:
            wrong = self.once()
        return wrong or ("the files of the base changed" if hashes(self.base) != first else "")


def _step(name: str) -> int:
    return int(name.partition("/")[0].rpartition("-")[2])


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), random.Random(options.seed))
        wrong = soak.run(options.minutes)
    for what, count in sorted(soak.counts.items()):
        print(f"{count:6} {what}")
    print("kills in a save by what was put down last:", dict(sorted(soak.saves.items())))
    print(wrong or "nothing lost or corrupt")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
