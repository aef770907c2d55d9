"""One guarded reader for the text, JSON and TOML files of users.

Whatever a file holds, the answer is its content or a FormatError that says why not: too large, no UTF-8, a NUL, nested too deeply.
"""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 16 * 1024 * 1024
"""Of a file that a person writes. Parsed values take some twenty times their text."""
MAX_DEPTH = 64

_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_LONG_KEY = re.compile(
    rf"""(?:^|[\[{{,])[ \t]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MAX_DEPTH}}}""", re.MULTILINE
)
Pairs = Callable[[list[tuple[str, object]]], object]


class FormatError(ValueError):
    """Why a file is refused, as a clause that follows its name."""


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. FormatError where there is none; only regular files are opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError("it is not a file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FormatError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FormatError(getattr(error, "strerror", None) or str(error)) from None
    if len(content) > max_bytes:
        raise FormatError(f"it is larger than {max_bytes // 1024**2} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"it is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise FormatError(f"it holds a NUL character (character {text.index(chr(0))}): the file is damaged")
    return text


def parse_json(text: str, pairs: Pairs | None = None) -> object:
    """A JSON text. FormatError where it is not valid, and for values that no path, caption or number can be.

    pairs: as `object_pairs_hook` of json.loads.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except ValueError as error:  # JSON errors, and numbers of thousands of digits
        raise FormatError(str(error)) from None
    _check(value, may_have_escapes="\\u" in text)
    return value


def parse_toml(text: str) -> dict[str, object]:
    """A TOML text. FormatError as `parse_json`."""
    if _LONG_KEY.search(text):
        raise FormatError(f"a key has more than {MAX_DEPTH} parts")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and dates and numbers that Python can't hold
        raise FormatError(str(error)) from None
    _check(tables, may_have_escapes="\\" in text)
    return tables


def _check(value: object, may_have_escapes: bool) -> None:
    """Refuse values that are nested too deeply or hold text that can't be encoded."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if may_have_escapes:
            for text in filter(None, map(_unusable, _texts(level))):
                raise FormatError(text)
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise FormatError(f"it is nested more than {MAX_DEPTH} levels deep")


def _texts(values: list[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from (key for key in value if isinstance(key, str))


def _unusable(text: str) -> str:
    """Why a text can't be used; "" where it can."""
    unusable = _UNUSABLE.search(text)
    if unusable is None:
        return ""
    if unusable.group() == "\0":
        return "it holds a NUL character (\\u0000)"
    return "it holds half of a character (\\ud800 to \\udfff alone); write it whole"
