"""A dataset file as text: parsed, and with line numbers for messages about it, since the TOML parser keeps none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.common.errors import UserError
from library.common.text_files import FormatError, parse_json, parse_toml, read_text

TablePath = tuple[str, ...]
"""("general",), ("datasets", "0"), ("datasets", "0", "subsets", "1"), and such a tuple followed by a key."""

_HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.\- ]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_\-]+)["']?\s*[=.]""")


@dataclass(frozen=True)
class Source:
    """A dataset file as parsed, with the line numbers of its tables and keys."""

    name: str
    tables: Mapping[str, Any]
    lines: Mapping[TablePath, int]

    def where(self, at: TablePath, key: str = "") -> str:
        """The name of a table or key for messages: file, line where it is known, table."""
        line = self.lines.get((*at, key)) or self.lines.get(at)
        parts = [self.name]
        if line:
            parts.append(f"line {line}")
        if at[:1] == ("datasets",):
            parts.append(f"dataset {int(at[1]) + 1}" if len(at) > 1 else "datasets")
            if len(at) > 3:
                parts.append(f"subset {int(at[3]) + 1}")
        elif at:
            parts.append(f"[{at[0]}]")
        return ", ".join(parts)


def read_source(path: Path) -> Source:
    """Parse a .toml or .json dataset file. Raises UserError where it is missing, of another kind, or malformed."""
    kind = path.suffix.lower()
    if kind not in (".toml", ".json"):
        raise UserError(f"{path}: a dataset file must end in .toml or .json.")
    try:
        text = read_text(path)
    except FormatError as error:
        raise UserError(f"{path}: the dataset file can't be read: {error}.") from None
    try:
        tables = parse_toml(text) if kind == ".toml" else parse_json(text, _without_duplicates)
    except FormatError as error:
        hint = " Write paths in 'single quotes' or with /." if "\\" in str(error) else ""
        raise UserError(f"{path}: {error}.{hint}") from None
    if not isinstance(tables, dict):
        raise UserError(f"{path}: the file must hold an object with the key datasets.")
    return Source(str(path), tables, find_lines(text) if kind == ".toml" else {})


class _DuplicateKey(FormatError):
    """A key that stands twice in one JSON object, of which json would silently keep the last."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKey(f'the key "{twice}" stands twice in one object')
    return table


def find_lines(text: str) -> dict[TablePath, int]:
    """Map each table and each key that begins a line to its line number, from 1.

    Only plain layouts are understood: [general], [[datasets]], [[datasets.subsets]] and keys at the start of a line. What
    stands in an inline table has no entry, and a message about it goes without a number.
    """
    lines: dict[TablePath, int] = {}
    table: TablePath = ()
    datasets = subsets = -1
    inside = ""  # the quotes of a multi-line string that is still open
    for number, line in enumerate(text.splitlines(), 1):
        opened_before = inside
        inside = _open_quotes(line, inside)
        if opened_before:
            continue
        if header := _HEADER.match(line):
            name = header.group(2).replace(" ", "")
            if name == "datasets":
                datasets, subsets = datasets + 1, -1
                table = ("datasets", str(datasets))
            elif name == "datasets.subsets":
                subsets += 1
                table = ("datasets", str(datasets), "subsets", str(subsets))
            else:
                table = tuple(name.split("."))
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, key.group(1)), number)
    return lines


def _open_quotes(line: str, inside: str) -> str:
    """The multi-line quotes that are open at the end of `line`, given those open at its start."""
    for quotes in re.findall(r'"""|\'\'\'', line):
        if not inside:
            inside = quotes
        elif quotes == inside:
            inside = ""
    return inside
