"""Preview prompts from .txt, .toml and .json files.

A line of a .txt file is a prompt followed by options, each behind a space and two dashes: `a cat --w 512 --h 768 --d 1`.
Dictionaries of .toml and .json files use long names. `[prompt]` of a .toml file holds defaults that each `[[prompt.subset]]`
may override.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.common.errors import Problems, UserError
from library.flow.samplers import SAMPLERS
from library.options.groups.sampling import SAMPLERS as KNOWN_SAMPLERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)
SIDE_MULTIPLE = 16
SMALLEST_SIDE = 64
LARGEST_SIDE = 8192


@dataclass(frozen=True)
class PreviewPrompt:
    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 30
    guidance: float = 7.5
    seed: int | None = None
    shift: float = 3.0
    sampler: str | None = None  # a value of SAMPLERS; None: --sample_sampler


# option of a line -> long names in dictionaries, field, type
_KEYS: dict[str, tuple[tuple[str, ...], str, type]] = {
    "w": (("width",), "width", int),
    "h": (("height",), "height", int),
    "d": (("seed",), "seed", int),
    "s": (("sample_steps", "steps"), "steps", int),
    "l": (("scale", "cfg_scale"), "guidance", float),
    "g": (("guidance_scale",), "guidance", float),
    "n": (("negative_prompt",), "negative_prompt", str),
    "fs": (("flow_shift", "shift"), "shift", float),
    "ss": (("sample_sampler", "sampler"), "sampler", str),
}
_NOT_FOR_SD3 = {
    "cn": "a control image",
    "ctr": "a control image ratio",
    "rcfg": "renormalised guidance",
    "controlnet_image": "a control image",
}
_LONG = {name: short for short, (names, _, _) in _KEYS.items() for name in names}


def read_prompts(path: str | Path) -> list[PreviewPrompt]:
    """The prompts of a file. UserError names file and line (or entry) of everything that is wrong."""
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".toml", ".json"):
        raise UserError(f"--sample_prompts {path}: the file must end in .txt, .toml or .json.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {path}: the file cannot be read ({error}).") from error
    problems, unsupported = Problems(), dict[str, str]()
    reader = {".txt": _from_lines, ".toml": _from_toml, ".json": _from_json}[path.suffix.lower()]
    try:
        prompts = reader(text, str(path), problems, unsupported)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--sample_prompts {path}: {error}.") from error
    problems.raise_if_any()
    if not prompts:
        raise UserError(f"--sample_prompts {path}: there is no prompt in it.")
    for option, what in unsupported.items():
        logger.warning("%s: %s (%s) has no meaning for SD3 and is left out.", path, option, what)
    return prompts


def _from_lines(text: str, where: str, problems: Problems, unsupported: dict[str, str]) -> list[PreviewPrompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            prompts.append(_from_line(line, f"{where}, line {number}", problems, unsupported))
    return [prompt for prompt in prompts if prompt is not None]


def _from_line(line: str, place: str, problems: Problems, unsupported: dict[str, str]) -> PreviewPrompt | None:
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z]+(?:\s|$))", line)
    given: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        key, _, value = str(option).strip().partition(" ")
        _take(given, key.lower(), value.strip(), f"--{key}", place, problems, unsupported)
    return _made(given, place, problems, unsupported)


def _from_toml(text: str, where: str, problems: Problems, unsupported: dict[str, str]) -> list[PreviewPrompt]:
    table = tomllib.loads(text).get("prompt")
    defaults = table if isinstance(table, dict) else {"subset": None}
    subsets = defaults.pop("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"--sample_prompts {where}: it needs a table [prompt] with [[prompt.subset]] tables in it.")
    return _from_entries([{**defaults, **subset} for subset in subsets], where, problems, unsupported)


def _from_json(text: str, where: str, problems: Problems, unsupported: dict[str, str]) -> list[PreviewPrompt]:
    data = json.loads(text)
    if not isinstance(data, list):
        raise UserError(f"--sample_prompts {where}: it must hold a list of prompts.")
    return _from_entries(data, where, problems, unsupported)


def _from_entries(
    entries: list[Any], where: str, problems: Problems, unsupported: dict[str, str]
) -> list[PreviewPrompt]:
    """Each entry is a line as in a .txt file, or a dictionary."""
    prompts = []
    for number, entry in enumerate(entries, 1):
        place = f"{where}, prompt {number}"
        if isinstance(entry, str):
            prompts.append(_from_line(" ".join(entry.split()), place, problems, unsupported))
        elif isinstance(entry, dict):
            prompts.append(_from_dictionary(entry, place, problems, unsupported))
        else:
            problems.add(f"{place}: it must be a text or a table.")
    return [prompt for prompt in prompts if prompt is not None]


def _from_dictionary(
    entry: dict[str, Any], place: str, problems: Problems, unsupported: dict[str, str]
) -> PreviewPrompt | None:
    given: dict[str, Any] = {}
    for name, value in entry.items():
        if name != "prompt":
            _take(given, _LONG.get(str(name), str(name)), value, str(name), place, problems, unsupported)
        elif isinstance(value, str):
            given["prompt"] = value
        else:
            problems.add(f"{place}: prompt must be a text, not {value!r}.")
            return None
    return _made(given, place, problems, unsupported)


def _take(
    given: dict[str, Any],
    key: str,
    value: Any,
    shown: str,
    place: str,
    problems: Problems,
    unsupported: dict[str, str],
) -> None:
    """Read one option into `given`. A null in a JSON file means not given."""
    if key in _NOT_FOR_SD3:
        unsupported[shown] = _NOT_FOR_SD3[key]
    elif key not in _KEYS:
        known = [f"--{short}" for short in _KEYS] if shown.startswith("--") else ["prompt", *_LONG]
        problems.add(f"{place}: {shown} is not known. Known are {', '.join(known)}.")
    elif value is not None:
        _, field, kind = _KEYS[key]
        try:
            given[field] = _NUMBERS[kind](value) if kind in _NUMBERS else str(value)
        except (TypeError, ValueError, OverflowError):
            problems.add(f"{place}: {shown} needs a {'whole number' if kind is int else 'number'}, not {value!r}.")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _finite(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


_NUMBERS: dict[type, Callable[[Any], Any]] = {int: _whole, float: _finite}


def _made(given: dict[str, Any], place: str, problems: Problems, unsupported: dict[str, str]) -> PreviewPrompt | None:
    if "prompt" not in given:
        problems.add(f"{place}: there is no prompt.")
        return None
    if "sampler" in given:
        given["sampler"] = _sampler(given["sampler"], place, problems, unsupported)
    prompt = PreviewPrompt(**given)
    if _has_half_characters(prompt.prompt + prompt.negative_prompt):
        problems.add(f"{place}: the text holds half of a character (a \\ud800 to \\udfff alone). Write it whole.")
    if prompt.seed is not None and not 0 <= prompt.seed < 2**64:
        problems.add(f"{place}: the seed {prompt.seed} must be 0 or more, and below 2^64.")
    if prompt.shift <= 0:
        problems.add(f"{place}: the shift {prompt.shift:g} must be above 0.")
    if max(prompt.width, prompt.height) > LARGEST_SIDE:
        problems.add(f"{place}: {prompt.width}x{prompt.height} is too large; {LARGEST_SIDE} pixels a side is the most.")
    return replace(
        prompt,
        width=_side(prompt.width),
        height=_side(prompt.height),
        steps=min(1000, max(1, prompt.steps)),
    )


def _sampler(name: str, place: str, problems: Problems, unsupported: dict[str, str]) -> str | None:
    """The sampler of that name. One for older models is told and left out, as with --sample_sampler."""
    if name not in SAMPLERS and name in KNOWN_SAMPLERS:
        unsupported[f"--ss {name}"] = "a sampler for older models"
    elif name not in SAMPLERS:
        problems.add(f"{place}: sampler {name!r} is not one of {', '.join(SAMPLERS)}.")
    return SAMPLERS.get(name)


def _has_half_characters(text: str) -> bool:
    """Whether it holds surrogates, which JSON can write and no tokenizer or picture can take."""
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def _side(pixels: int) -> int:
    """The nearest multiple of 16, at least 64."""
    return max(SMALLEST_SIDE, (pixels + SIDE_MULTIPLE // 2) // SIDE_MULTIPLE * SIDE_MULTIPLE)
