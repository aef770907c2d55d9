"""`--network_args "key=value" …` as typed values: the parsers that both network modules use (lora_arguments.py, lycoris_arguments.py)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

from library.common.errors import UserError

Settings = TypeVar("Settings")
Parser: TypeAlias = Callable[[str], object]  # text -> value; ValueError whose message completes "KEY must be …"

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")


def boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError("true or false")


def whole_number(least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `least` to `most`, both included."""
    expected = f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}")

    def parse(text: str) -> int:
        try:
            value = int(text.strip())
        except ValueError:
            raise ValueError(expected) from None
        if value < least or (most is not None and value > most):
            raise ValueError(expected)
        return value

    return parse


def number(least: float = -math.inf, below: float = math.inf, expected: str = "a number") -> Callable[[str], float]:
    """A parser of finite numbers v with least <= v < below."""

    def parse(text: str) -> float:
        try:
            value = float(text.strip())
        except ValueError:
            raise ValueError(expected) from None
        if not (math.isfinite(value) and least <= value < below):
            raise ValueError(expected)
        return value

    return parse


def probability() -> Callable[[str], float]:
    return number(0.0, 1.0, "a number from 0 to below 1")


def choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in names:
            raise ValueError("one of " + ", ".join(names))
        return word

    return parse


def split_arguments(strings: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """["key=value", …] -> ({key: value}, problems). A value may hold "=" itself: the first one divides."""
    texts: dict[str, str] = {}
    problems = []
    for text in strings:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f'--network_args: "{text}" is not of the form key=value.')
        elif key in texts and texts[key] != value.strip():
            problems.append(f'--network_args: {key} is given twice, as "{texts[key]}" and as "{value.strip()}".')
        else:
            texts[key] = value.strip()
    return texts, problems


def typed_values(texts: Mapping[str, object], parsers: Mapping[str, Parser]) -> tuple[dict[str, object], list[str]]:
    """Texts (or values whose str() is such a text) -> ({key: typed value}, problems). Unknown keys name their nearest."""
    values: dict[str, object] = {}
    problems = []
    for key, text in texts.items():
        if key not in parsers:
            problems.append(f"--network_args: there is no {key}.{nearest_name(key, parsers)}")
            continue
        try:
            values[key] = parsers[key](str(text))
        except ValueError as expected:
            problems.append(f'--network_args: {key} must be {expected}, not "{text}".')
    return values, problems


def make_settings(kind: Callable[..., Settings], values: Mapping[str, object]) -> Settings:
    """A settings dataclass from values that its parsers have checked."""
    return kind(**values)


def nearest_name(key: str, known: Iterable[str]) -> str:
    """ " Did you mean …?" or, where no name is near, all known names; begins with a space."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else " Known are: " + ", ".join(names) + "."


def arguments_of(strings: Iterable[str] | None) -> dict[str, str]:
    """The keyword arguments for a module's `create_network`. UserError where a string has no "=" or a key comes twice."""
    texts, problems = split_arguments(strings or [])
    if problems:
        raise UserError(problems)
    return texts
