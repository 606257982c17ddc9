"""Names of modules: the patterns that PEFT's configurations hold, and lists of names written short as globs.

PEFT reads `rank_pattern` and the like as regular expressions. They come from strangers, and a regular expression may
take any time, so those with few repeats are admitted, none inside a repeated group, on names of bounded length.

>>> matches("q_proj", "model.layers.0.self_attn.q_proj"), shortened(["h.0.q", "h.1.q"], ["h.0.q", "h.1.q", "h.0.k"])
(True, ['h.*.q'])
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from peftc.diagnostics import fail
from peftc.lang.complaints import shown

_LONGEST, _REPEATS = 300, 3
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_ADMITTED = re.compile(r"[A-Za-z0-9_.\-\\^$*+?|()\[\]]+")


def matches(pattern: str, name: str) -> bool:
    """Whether a key of a pattern of PEFT's means a module: its whole name, or the end of it after a dot.

    Raises `PeftcError` E081: it is no such regular expression, or one that may take any time.
    """
    if _PLAIN.fullmatch(pattern) and "." not in pattern:
        return name == pattern or name.endswith(f".{pattern}")
    if not _is_quick(pattern):
        message = f"the pattern `{shown(pattern)}` is more than peftc runs of a regular expression from a file"
        fail("E081", message, help=f"name the modules, or use at most {_REPEATS} repeats and none of a group")
    try:
        return _compiled(rf"(?:.*\.)?(?:{pattern})\Z").match(name) is not None
    except re.error as error:
        fail("E081", f"the pattern `{shown(pattern)}` is no regular expression: {error}", help="name the modules")


def is_target(target: str | Collection[str], name: str, *, unknown: bool = True) -> bool:
    """Whether `target_modules` means a module: a list of ends of names, or a regular expression for whole names.

    A regular expression that may take any time is not run: the answer is `unknown`.
    """
    if not isinstance(target, str):
        return any(name == one or name.endswith(f".{one}") for one in target)
    try:
        return _compiled(rf"(?:{target})\Z").match(name) is not None if _is_quick(target) else unknown
    except re.error:
        return unknown


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _is_quick(pattern: str) -> bool:
    if len(pattern) > _LONGEST or not _ADMITTED.fullmatch(pattern):
        return False
    bare = re.sub(r"\\.", "a", pattern)
    return len(re.findall(r"[*+]", bare)) <= _REPEATS and not re.search(r"\)[*+?]", bare) and "(?" not in bare


def shortened(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Globs that mean, of `known`, exactly `names`: numbers become `*` where that means nothing else."""
    wanted = dict.fromkeys(names)
    found: dict[str, None] = {}
    for name in wanted:
        glob = ".".join("*" if part.isdigit() else part for part in name.split("."))
        meant = {other for other in known if fnmatch.fnmatchcase(other, glob)} if glob not in found else set()
        found[glob if glob in found or meant <= wanted.keys() else name] = None
    return list(found)
