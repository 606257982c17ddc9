"""The options of an adapter's configuration against those that the table of methods knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftc.diagnostics import did_you_mean, fail
from peftc.interop.adapter import CONFIG, Adapter
from peftc.interop.names import is_target, matches
from peftc.interop.table import ANY, Method, methods
from peftc.lang.complaints import shown


def method_of(adapter: Adapter) -> Method:
    """The method of the adapter. Raises `PeftcError` E081: it is not supported, or one of its options is not."""
    name = adapter.config.get("peft_type")
    table = methods()
    if not isinstance(name, str):
        fail("E080", f"{adapter.path / CONFIG} names no `peft_type`", help="was it saved by PEFT?")
    if name not in table:
        message = f"{adapter.path}: adapters of type {shown(name)} are not read"
        near = did_you_mean(name, table) or ""
        known = f"peftc reads {', '.join(sorted(table))}"
        fail("E081", message, help=f"{near} {known}" if near.startswith("did") else known)
    method = table[name]
    for key, value in adapter.config.items():
        _check(adapter, method, key, value)
    return method


def _check(adapter: Adapter, method: Method, key: str, value: Any) -> None:
    admitted = method.options.get(key, [None, False, {}, []])
    if admitted == ANY or any(value == one and type(value) is type(one) for one in admitted):
        return
    message = (
        f"{adapter.path / CONFIG}: `{shown(key)}: {shown(str(value))}` of a {method.peft_type} adapter is not read"
    )
    words = ", ".join(_word(one) for one in admitted)
    known = key in method.options
    help = f"it may be {words}" if known else "it may change what is computed, so it is not passed over"
    fail("E081", message, help=help)


def _word(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def number(adapter: Adapter, entry: Mapping[str, Any], path: str) -> int | float | bool:
    """An option of a module: the value of the first pattern that means it, or that of all. Raises E080, E081."""
    key, value = entry["option"], adapter.config.get(entry["option"], entry.get("default", 0))
    patterns = adapter.config.get(entry.get("pattern", "")) or {}
    if not isinstance(patterns, dict):
        fail("E080", f"{adapter.path / CONFIG}: `{entry['pattern']}` is no mapping", help="save the adapter again")
    value = next((patterns[pattern] for pattern in patterns if matches(pattern, path)), value)
    if not isinstance(value, (int, float)) or value != value or abs(value) > 1e15:
        fail("E080", f"{adapter.path / CONFIG}: `{key}` is {shown(str(value))}, not a number", help="save it again")
    return value


def indices(adapter: Adapter, key: str, path: str) -> tuple[int, ...]:
    """The tokens that an embedding trains: a list, or one for each of several modules. Raises E080."""
    value = adapter.config.get(key)
    if isinstance(value, dict):
        value = next((value[name] for name in value if is_target([name], path)), None)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        message = f"{adapter.path / CONFIG}: `{key}` lists no tokens for {path}"
        fail("E080", message, help="it is a list of token ids, or of such lists by module")
    return tuple(value)
