"""Merge, export, unmerge, kill -9, in a loop: the destination is whole or absent every time.

    python tests/kill_merge.py 200            # kills
    python tests/kill_merge.py 200 --seed 7

A child merges a tiny model into a checkpoint, exports it to ONNX, or restores the base from a merged one, and is killed
at a moment that is drawn: anywhere in its run, or once it has begun to write. The destination holds nothing before, or
what an earlier run of another delta wrote. Afterwards it must be one of these, byte for byte: what was there before,
what the child was to write, or, only where a hidden sibling still holds the old one, nothing. The next run must put
that one back, and one that comes to its end must leave no sibling. The files of base and delta must stay what they are.
Exit code 1 at the first difference.
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

IMPORTED = [
    "torch",
    "transformers",
    "onnxruntime",
    "peftc.merging.merge",
    "peftc.merging.unmerge",
    "peftc.backends.onnx",
]
KINDS = ("merge", "merge", "onnx", "unmerge")


def prepare(folder: Path) -> None:
    """A BERT of some megabytes in several shards, and two deltas of it."""
    import torch
    import transformers
    from fold.support import adapt

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=4000, **sizes))
    base.save_pretrained(folder / "base", max_shard_size="1MB")
    for name, rank in (("old", 2), ("new", 3)):
        adapt("lora", folder / "base", set={"r": rank}).save_pretrained(folder / name)


def child(folder: Path, kind: str, delta: str, out: Path) -> None:
    """One run to its end."""
    import torch

    from peftc import driver

    torch.set_num_threads(1)
    if kind == "unmerge":
        driver.unmerge(folder / f"merge-{delta}", out)
    elif kind == "onnx":
        driver.merge(folder / delta, out, export={"onnx"})
    else:
        driver.merge(folder / delta, out, outputs=False, undo=True)


def contents(directory: Path) -> dict[str, Any] | None:
    """Every file of a directory with its sha256, or None where there is none; of a certificate what does not depend on
    rounding in a product's order."""
    if not directory.exists():
        return None
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.name == "certificate.json":
            document = json.loads(path.read_text())
            document.pop("comparisons")
            found[path.name] = document
        elif path.is_file():
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@dataclass
class Kills:
    """The state of the loop, and what has been counted."""

    folder: Path
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    whole: dict[tuple[str, str], Any] = field(default_factory=dict)
    """What undisturbed runs write, by kind and delta."""
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(IMPORTED)
        self.place = self.folder / "destinations"

    def start(self, kind: str, delta: str, out: Path) -> Any:
        process = self.forks.Process(target=child, args=(self.folder, kind, delta, out))
        process.start()
        return process

    def undisturbed(self) -> str:
        """Run everything once to its end, for its contents and its time."""
        for delta in ("old", "new"):
            for kind in dict.fromkeys(KINDS):
                out, began = self.folder / f"{kind}-{delta}", time.monotonic()
                process = self.start(kind, delta, out)
                process.join()
                if process.exitcode != 0:
                    return f"an undisturbed {kind} failed"
                self.whole[kind, delta], self.seconds[kind] = contents(out), time.monotonic() - began
        return ""

    def siblings(self) -> list[Path]:
        return [path for path in self.place.iterdir() if path.name.startswith(".")]

    def once(self) -> str:
        """One child and what is wrong after it; "" where nothing is."""
        kind = self.draw.choice(KINDS)
        out = self.place / kind
        if kind == "unmerge" or self.draw.random() < 0.4:  # what unmerge writes is never replaced
            shutil.rmtree(out, ignore_errors=True)
            for path in self.place.glob(f".{kind}.*.old"):
                shutil.rmtree(path)
        before = contents(out)
        delta = "new" if before is None or before == self.whole[kind, "old"] else "old"
        process = self.start(kind, delta, out)
        self.wait(process, kind)
        process.kill()
        process.join()
        if process.exitcode not in (0, -9):
            return f"a {kind} failed with {process.exitcode}"
        return self.check(kind, delta, before, killed=process.exitcode == -9)

    def wait(self, process: Any, kind: str) -> None:
        """Until the moment to kill."""
        limit = time.monotonic() + 10 * self.seconds[kind] + 60
        if self.draw.random() < 0.4:
            time.sleep(self.draw.random() * self.seconds[kind])
            return
        old = set(self.siblings())
        while process.is_alive() and time.monotonic() < limit and not set(self.siblings()) - old:
            time.sleep(0.0005)
        time.sleep(self.draw.random() * self.draw.choice((0.003, 0.05, 0.2 * self.seconds[kind])))

    def check(self, kind: str, delta: str, before: Any, *, killed: bool) -> str:
        now, kept = contents(self.place / kind), list(self.place.glob(f".{kind}.*.old"))
        self.counts[f"{kind} {'killed' if killed else 'came to its end'}"] += 1
        if not killed:
            left = [path.name for path in self.siblings() if path.name.startswith(f".{kind}.")]
            return f"left behind: {left}" if left else "" if now == self.whole[kind, delta] else f"a {kind} differs"
        self.counts["a sibling left by a kill"] += bool(self.siblings())
        if now == self.whole[kind, delta]:
            self.counts["destination: the new one"] += 1
        elif now == before:
            self.counts["destination: absent" if now is None else "destination: the old one"] += 1
        elif now is None and any(contents(path) == before for path in kept):
            self.counts["destination: absent, the old one beside it"] += 1
        else:
            return f"a killed {kind} left {sorted(now or ())} where {sorted(before or ())} was"
        return ""

    def run(self, kills: int) -> str:
        """Kill `kills` children; what is wrong, or ""."""
        prepare(self.folder)
        self.place.mkdir()
        inputs = [contents(self.folder / name) for name in ("base", "old", "new")]
        wrong = self.undisturbed()
        while not wrong and sum(n for what, n in self.counts.items() if what.endswith(" killed")) < kills:
            wrong = self.once()
            if sum(self.counts.values()) % 20 == 0:
                print(time.strftime("%H:%M:%S"), dict(sorted(self.counts.items())), flush=True)
        for kind in dict.fromkeys(KINDS) if not wrong else ():
            shutil.rmtree(self.place / kind, ignore_errors=True)
            process = self.start(kind, "new", self.place / kind)
            process.join()
            wrong = wrong or ("" if process.exitcode == 0 else f"the last {kind} failed")
            wrong = wrong or self.check(kind, "new", None, killed=False)
        if not wrong and [contents(self.folder / name) for name in ("base", "old", "new")] != inputs:
            wrong = "a file of the base or of a delta changed"
        return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loop = Kills(Path(folder), random.Random(options.seed))
        wrong = loop.run(options.kills)
    for what, count in sorted(loop.counts.items()):
        print(f"{count:6} {what}")
    print(wrong or "whole or absent every time")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
