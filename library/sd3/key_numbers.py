"""How many layers a checkpoint's keys tell of."""

from __future__ import annotations

import re
from collections.abc import Iterable


def count_numbers(pattern: str, keys: Iterable[str]) -> int:
    """How many different numbers stand where `pattern` has its group. Each is counted once, so that no key can claim a
    billion layers; where numbers are left out, the tensors that the count asks for are missing, and that is told."""
    compiled = re.compile(pattern, re.ASCII)
    return len({match[1] for key in keys if (match := compiled.match(key))})
