"""Values of options in the types that settings have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None


def tuple_or_none(values: Iterable[Item] | None) -> tuple[Item, ...] | None:
    return None if values is None else tuple(values)
