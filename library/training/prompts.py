"""Preview prompts from .txt, .toml and .json files.

A line of a .txt file is a prompt followed by options, each behind a space and two dashes: `a cat --w 512 --h 768 --d 1`.
Dictionaries of .toml and .json files use long names. `[prompt]` of a .toml file holds defaults that each `[[prompt.subset]]`
may override.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.options.errors import Problems, UserError
from library.sd3.sampling import SAMPLERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)
SIDE_MULTIPLE = 16
SMALLEST_SIDE = 64


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
_KEYS: dict[str, tuple[tuple[str, ...], str, Callable[[Any], Any]]] = {
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
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        place = f"{where}, line {number}"
        prompt, *options = re.split(r"(?:^|\s)--(?=[a-z]+(?:\s|$))", line)
        given: dict[str, Any] = {}
        for option in options:
            key, _, value = str(option).strip().partition(" ")
            _take(given, key, value.strip(), f"--{key}", place, problems, unsupported)
        prompts.append(_made({"prompt": prompt.strip(), **given}, place, problems))
    return [prompt for prompt in prompts if prompt is not None]


def _from_toml(text: str, where: str, problems: Problems, unsupported: dict[str, str]) -> list[PreviewPrompt]:
    table = tomllib.loads(text).get("prompt")
    if not isinstance(table, dict):
        raise UserError(f"--sample_prompts {where}: it needs a table [prompt] with [[prompt.subset]] tables in it.")
    subsets = table.pop("subset", [{}])
    return _from_dictionaries([{**table, **subset} for subset in subsets], where, problems, unsupported)


def _from_json(text: str, where: str, problems: Problems, unsupported: dict[str, str]) -> list[PreviewPrompt]:
    data = json.loads(text)
    if not isinstance(data, list):
        raise UserError(f"--sample_prompts {where}: it must hold a list of prompts.")
    prompts = []
    for number, entry in enumerate(data, 1):
        if isinstance(entry, str):
            line = " ".join(entry.split())
            prompts += _from_lines(line, f"{where}, prompt {number}", problems, unsupported)
        else:
            prompts += _from_dictionaries([entry], where, problems, unsupported, first=number)
    return prompts


def _from_dictionaries(
    entries: list[Any], where: str, problems: Problems, unsupported: dict[str, str], first: int = 1
) -> list[PreviewPrompt]:
    prompts = []
    for number, entry in enumerate(entries, first):
        place = f"{where}, prompt {number}"
        if not isinstance(entry, dict):
            problems.add(f"{place}: it must be a text or a table.")
            continue
        given: dict[str, Any] = {}
        for name, value in entry.items():
            if name == "prompt":
                given["prompt"] = str(value)
            else:
                _take(given, _LONG.get(str(name), str(name)), value, str(name), place, problems, unsupported)
        prompts.append(_made(given, place, problems))
    return [prompt for prompt in prompts if prompt is not None]


def _take(
    given: dict[str, Any],
    key: str,
    value: Any,
    shown: str,
    place: str,
    problems: Problems,
    unsupported: dict[str, str],
) -> None:
    if key in _NOT_FOR_SD3:
        unsupported[shown] = _NOT_FOR_SD3[key]
        return
    if key not in _KEYS:
        problems.add(f"{place}: {shown} is not known. Known are {', '.join('--' + k for k in _KEYS)}.")
        return
    _, field, kind = _KEYS[key]
    try:
        given[field] = kind(value)
    except (TypeError, ValueError):
        problems.add(f"{place}: {shown} needs a {'whole number' if kind is int else 'number'}, not {value!r}.")


def _made(given: dict[str, Any], place: str, problems: Problems) -> PreviewPrompt | None:
    if "prompt" not in given:
        problems.add(f"{place}: there is no prompt.")
        return None
    if given.get("sampler") is not None:
        sampler = SAMPLERS.get(given["sampler"])
        if sampler is None:
            problems.add(f"{place}: sampler {given['sampler']!r} is not one of {', '.join(SAMPLERS)}.")
        given["sampler"] = sampler
    prompt = PreviewPrompt(**given)
    return replace(
        prompt,
        width=_side(prompt.width),
        height=_side(prompt.height),
        steps=min(1000, max(1, prompt.steps)),
    )


def _side(pixels: int) -> int:
    """The nearest multiple of 16, at least 64."""
    return max(SMALLEST_SIDE, (pixels + SIDE_MULTIPLE // 2) // SIDE_MULTIPLE * SIDE_MULTIPLE)
