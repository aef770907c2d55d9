"""From the command line's Namespace to the frozen settings of the packages below: `args` goes no further.

One function for each settings class: of the models (models.py), of what is worked out before any weight is read (plan.py), of the
loop (training.py), of what runs between steps (monitoring.py) and of the files (saving.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def path_or_none(text: str | None) -> Path | None:
    """None for a path that is empty or missing."""
    return Path(text) if text else None


def tuple_or_none(values: Iterable[Item] | None) -> tuple[Item, ...] | None:
    return None if values is None else tuple(values)
