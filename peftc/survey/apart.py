"""A measurement in a process of its own, with bounds on time and memory: one that misbehaves ends alone.

    reason = apart(context, work, ("llama",), heard, seconds=90)

`work(sender, *arguments)` sends what it knows so far, as often as it likes, as `(document, False)`, and at the end as
`(document, True)`; `heard` is called with each document.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any


def apart(
    context: ForkServerContext,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    heard: Callable[[Any], None],
    *,
    seconds: float,
) -> str | None:
    """Run `work` and hand on what it sends; why it ended early, in words, or None. It is killed when the time is up."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    end, done, reason = time.monotonic() + seconds, False, None
    while not done and reason is None:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            reason = f"not done after {seconds:g} s"
            continue
        try:
            document, done = receiver.recv()
        except EOFError:
            process.join(5)
            reason = f"the process ended with code {process.exitcode}: out of memory, or a crash in native code"
        else:
            heard(document)
    if process.is_alive() and not done:
        process.kill()
    process.join(5)
    receiver.close()
    return reason


def confine(memory: int) -> None:
    """Inside the process: silence, no traces on disk, and at most `memory` bytes of address space.

    Models print while they are built, and hundreds of traces would be kept that nobody asks for again.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.environ["PEFTC_CACHE"] = "off"
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
