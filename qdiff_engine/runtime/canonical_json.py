"""JSON that may come from a stranger: one spelling per value, plain values only, bounded in size and depth."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32
MAX_VALUES = 2_000_000  # an empty list takes 3 bytes in a file and 60 in memory
_MAX_DIGITS = 32  # int() of a long string is quadratic


def dump(value: Any) -> bytes:
    """The one spelling of ``value``: ASCII, sorted keys, two spaces of indent, no NaN, a final newline.

    Raises:
        ValueError: ``value`` holds something other than finite numbers, strings, booleans, None, lists and string-keyed
            dicts; the message says where.
    """
    check_plain(value)
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False, separators=(",", ": "))
    return text.encode("ascii") + b"\n"


def dump_line(value: Any) -> str:
    """``value`` on one line, ASCII, its keys in their own order, no NaN."""
    check_plain(value)
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(", ", ": "))


def parse(data: bytes) -> Any:
    """The value written in ``data``.

    Raises:
        ValueError: not UTF-8, not JSON, a key given twice, NaN or infinity, an integer beyond 64 bits, nested deeper
            than `MAX_DEPTH`, or more than `MAX_VALUES` values.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise ValueError(f"holds more than {MAX_VALUES} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_int=lambda text: int(_short(text)),
            parse_float=lambda text: float(_short(text)),
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    check_plain(value)
    return value


def check_plain(value: Any) -> None:
    """Raise ValueError, naming the place, unless ``value`` survives JSON unchanged (tuples count as lists)."""
    pending: list[tuple[Any, str, int]] = [(value, "", 0)]
    while pending:
        item, where, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{where[:80]}... is nested deeper than {MAX_DEPTH} levels")
        if isinstance(item, dict):
            for key, inner in item.items():
                if not isinstance(key, str):
                    raise ValueError(f"{where or 'the object'} has the key {key!r}, which is not a string")
                pending.append((inner, f"{where}.{key}" if where else key, depth + 1))
        elif isinstance(item, list | tuple):
            pending.extend((inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(item))
        else:
            _check_scalar(item, where or "the value")


def _check_scalar(value: Any, where: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where!a} must be finite, got {value}")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{where!a} is an integer beyond 64 bits")
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"{where!a} is of type {type(value).__name__}, which JSON cannot hold")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twice!a} is given twice")
    return values


def _short(text: str) -> str:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:12]}... has {len(text)} digits")
    return text


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")
