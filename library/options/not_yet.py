"""Options that parse but whose feature is not part of this build yet: using one is an error that says so.

An option counts as used when its value differs from its default. An entry is taken out when its feature lands.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_PLAN = "the memory plan is not wired in; choose --blocks_to_swap and --gradient_checkpointing yourself"

NOT_YET: Mapping[str, str] = MappingProxyType(
    {
        "memory_plan": _PLAN,
        "vram": _PLAN,
    }
)
