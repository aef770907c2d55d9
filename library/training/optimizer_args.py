"""`--optimizer_args key=value …` and `--lr_scheduler_args key=value …` as keyword arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from typing import Any

from library.common.errors import Problems

MAX_CHARACTERS, MAX_OPENING = 2000, 50
_OPENING = re.compile(r"[\[({+\-~]")  # what a literal may nest


def parse_keyword_args(
    option: str, pairs: Sequence[str] | None, text_keys: Collection[str] = (), reserved: Collection[str] = ()
) -> dict[str, Any]:
    """Parse "key=value" pairs, values as Python literals: `betas=0.9,0.99`, `decouple=True`, `eps=None`.

    Only the first "=" divides. Keys in `text_keys` may have plain text for a value. Keys in `reserved` are set by
    options of their own. Raises UserError with every bad pair; `option` is the name that it shows.
    """
    problems = Problems()
    parsed: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier():
            problems.add(f'{option}: "{pair}" is not of the form key=value.')
        elif key in parsed:
            problems.add(f"{option}: {key} is given twice.")
        elif key in reserved:
            problems.add(f"{option}: {key} has an option of its own (--learning_rate for lr): remove it here.")
        else:
            try:
                parsed[key] = _literal(text)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # TypeError: a list as a key
                parsed[key] = text
                if key not in text_keys:
                    problems.add(f'{option}: the value of "{pair}" is no Python literal. {_advice(key, text)}')
    problems.raise_if_any()
    return parsed


def _literal(text: str) -> object:
    """A Python literal. ValueError for one that is longer or deeper than any argument."""
    if len(text) > MAX_CHARACTERS or len(_OPENING.findall(text)) > MAX_OPENING:  # deep ones can end the process
        raise ValueError("too long")
    return ast.literal_eval(text)


def as_text(arguments: dict[str, Any]) -> str:
    """`(k=v,k2=v2)` for metadata and messages; "" without arguments."""
    return f"({','.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else ""


def _advice(key: str, text: str) -> str:
    literal = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(text.lower())
    if literal:
        return f"Write {key}={literal}."
    return f"Numbers, True, False, None, tuples like 0.9,0.99 and quoted text work: {key}='{text}'."
