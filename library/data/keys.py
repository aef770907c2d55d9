"""What a key of the dataset file is. Each is declared once: a field of `library.data.settings` whose annotation holds a `Key`.

From the fields derive the tables that check a file (`schema`), the defaults of the command line (`command_line`) and the table in
docs/options.md. The rest of an annotation is pydantic's: it says which values are valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field as Valid
from pydantic_core import PydanticCustomError

Level = Literal["general", "datasets", "subsets"]
Style = Literal["folder", "metadata", "mask"]
"""Of a dataset: its subsets are folders of images, metadata files, or folders of images with a folder of masks."""
STYLES: tuple[Style, ...] = ("folder", "metadata", "mask")
SAME_NAME = "the key's own name"
LARGEST_SIDE = 8192  # of a resolution, in pixels
LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Key:
    """Where the key may be written, in which styles of dataset, and the option of the command line that is its default."""

    levels: tuple[Level, ...] = ("general", "datasets", "subsets")
    styles: tuple[Style, ...] = STYLES
    required: tuple[Style, ...] = ()
    option: str | None = SAME_NAME
    written: object = None  # the type in the file, where the settings' own is another


@dataclass(frozen=True)
class DeclaredKey:
    """A key with its name, the type that values are checked with, and its default (None where it has none)."""

    name: str
    key: Key
    type: Any
    default: object

    @property
    def option(self) -> str | None:
        return self.name if self.key.option == SAME_NAME else self.key.option


def declared_keys(settings: Iterable[type]) -> dict[str, DeclaredKey]:
    """The keys among the fields of settings classes, by name."""
    keys = {}
    for owner in settings:
        hints = get_type_hints(owner, include_extras=True)
        for each in fields(owner):
            hint = hints[each.name]
            parts = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            for key in (part for part in parts if isinstance(part, Key)):
                keys[each.name] = DeclaredKey(each.name, key, key.written or hint, _default(each))
    return keys


def _default(each: Field[Any]) -> object:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return None if each.default is MISSING else each.default


def _size(value: object) -> object:
    """1024 or [832, 1216] -> (W, H)."""
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise PydanticCustomError("size", "must be a whole number or [width, height]")
    if min(sides) < 1:
        raise PydanticCustomError("size", "must be above 0")
    if max(sides) > LARGEST_SIDE:
        raise PydanticCustomError("size", "must be at most 8192 pixels a side, which is beyond every model")
    return tuple(sides)


def _range(value: object) -> object:
    """[0.3, 0.6] -> (0.3, 0.6)."""
    ends = value if isinstance(value, list | tuple) else []
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise PydanticCustomError("range", "must be two numbers, as in [0.3, 0.6]")
    if not 0 < ends[0] <= ends[1]:
        raise PydanticCustomError("range", "must be two numbers above 0, the smaller one first")
    return (float(ends[0]), float(ends[1]))


Resolution = Annotated[tuple[int, int], BeforeValidator(_size)]
FaceRange = Annotated[tuple[float, float], BeforeValidator(_range)]
Probability = Annotated[float, Valid(ge=0, le=1)]
Text = Annotated[str, Valid(min_length=1)]
Positive = Annotated[int, Valid(ge=1, le=LARGEST_COUNT)]
NotNegative = Annotated[int, Valid(ge=0, le=LARGEST_COUNT)]
Repeats = Annotated[int, Valid(le=LARGEST_COUNT)]
