"""Preview prompts from .txt, .toml and .json files.

A line of a .txt file is a prompt followed by options, each behind a space and two dashes: `a cat --w 512 --h 768 --d 1`.
Dictionaries of .toml and .json files use long names. `[prompt]` of a .toml file holds defaults that each `[[prompt.subset]]`
may override.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from library.common.errors import Problems, UserError
from library.common.text_files import FormatError, parse_json, parse_toml, read_text

logger = logging.getLogger(__name__)
SIDE_MULTIPLE = 16
SMALLEST_SIDE = 64
LARGEST_SIDE = 8192
Fields = dict[str, object]
"""Values of PreviewPrompt by field."""


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
    sampler: str | None = None  # None: --sample_sampler


# option of a line -> long names in tables, field, type
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


def read_prompts(
    path: str | Path, samplers: Mapping[str, str], other_samplers: Collection[str] = ()
) -> list[PreviewPrompt]:
    """Read the prompts of a file.

    samplers: from the names that a prompt may use to PreviewPrompt.sampler. other_samplers: names that are ignored with a
    warning. UserError lists everything that is wrong, with the file's line or entry.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".toml", ".json"):
        raise UserError(f"--sample_prompts {path}: the file must end in .txt, .toml or .json.")
    try:
        text = read_text(path)
    except FormatError as error:
        raise UserError(f"--sample_prompts {path}: the file cannot be read ({error}).") from error
    parser = _PromptParser(str(path), samplers, other_samplers)
    read = {".txt": parser.from_lines, ".toml": parser.from_toml, ".json": parser.from_json}[path.suffix.lower()]
    try:
        prompts = read(text)
    except FormatError as error:
        raise UserError(f"--sample_prompts {path}: {error}.") from error
    parser.problems.raise_if_any()
    if not prompts:
        raise UserError(f"--sample_prompts {path}: there is no prompt in it.")
    for option, what in parser.unsupported.items():
        logger.warning("%s: %s (%s) has no meaning for SD3 and is left out.", path, option, what)
    return prompts


class _PromptParser:
    """Parses one file and collects what is wrong with it. `where` in its methods names a line or an entry."""

    def __init__(self, file: str, samplers: Mapping[str, str], other_samplers: Collection[str]):
        self.file, self.samplers, self.other_samplers = file, samplers, other_samplers
        self.problems = Problems()
        self.unsupported: dict[str, str] = {}  # option as written -> what it is

    def from_lines(self, text: str) -> list[PreviewPrompt]:
        prompts = []
        for number, line in enumerate(text.split("\n"), 1):
            line = line.strip()
            if line and not line.startswith("#"):
                prompts.append(self._from_line(line, f"{self.file}, line {number}"))
        return [prompt for prompt in prompts if prompt is not None]

    def from_toml(self, text: str) -> list[PreviewPrompt]:
        table = parse_toml(text).get("prompt")
        defaults = table if isinstance(table, dict) else {"subset": None}
        subsets = defaults.pop("subset", [{}])
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            raise UserError(
                f"--sample_prompts {self.file}: it needs a table [prompt] with [[prompt.subset]] tables in it."
            )
        return self._from_entries([{**defaults, **subset} for subset in subsets])

    def from_json(self, text: str) -> list[PreviewPrompt]:
        data = parse_json(text)
        if not isinstance(data, list):
            raise UserError(f"--sample_prompts {self.file}: it must hold a list of prompts.")
        return self._from_entries(data)

    def _from_entries(self, entries: list[object]) -> list[PreviewPrompt]:
        """Each entry is a line as in a .txt file, or a table."""
        prompts = []
        for number, entry in enumerate(entries, 1):
            where = f"{self.file}, prompt {number}"
            if isinstance(entry, str):
                prompts.append(self._from_line(" ".join(entry.split()), where))
            elif isinstance(entry, dict):
                prompts.append(self._from_table(entry, where))
            else:
                self.problems.add(f"{where}: it must be a text or a table.")
        return [prompt for prompt in prompts if prompt is not None]

    def _from_line(self, line: str, where: str) -> PreviewPrompt | None:
        prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z]+(?:\s|$))", line)
        fields: Fields = {"prompt": prompt.strip()}
        for option in options:
            key, _, value = str(option).strip().partition(" ")
            self._parse(fields, key.lower(), value.strip(), f"--{key}", where)
        return self._prompt(fields, where)

    def _from_table(self, table: Mapping[object, object], where: str) -> PreviewPrompt | None:
        fields: Fields = {}
        for name, value in table.items():
            if name != "prompt":
                self._parse(fields, _LONG.get(str(name), str(name)), value, str(name), where)
            elif isinstance(value, str):
                fields["prompt"] = value
            else:
                self.problems.add(f"{where}: prompt must be a text, not {value!r}.")
                return None
        return self._prompt(fields, where)

    def _parse(self, fields: Fields, key: str, value: object, option: str, where: str) -> None:
        """Parse one option into `fields`. `option` is its name as written. A null in a JSON file means that it is unset."""
        if key in _NOT_FOR_SD3:
            self.unsupported[option] = _NOT_FOR_SD3[key]
        elif key not in _KEYS:
            known = [f"--{short}" for short in _KEYS] if option.startswith("--") else ["prompt", *_LONG]
            self.problems.add(f"{where}: {option} is not known. Known are {', '.join(known)}.")
        elif value is not None:
            _, field, kind = _KEYS[key]
            try:
                fields[field] = _NUMBERS[kind](value) if kind in _NUMBERS else str(value)
            except (TypeError, ValueError, OverflowError):
                number = "whole number" if kind is int else "number"
                self.problems.add(f"{where}: {option} needs a {number}, not {value!r}.")

    def _prompt(self, fields: Fields, where: str) -> PreviewPrompt | None:
        """The prompt with sides rounded and steps clamped; problems with its values are collected."""
        if "prompt" not in fields:
            self.problems.add(f"{where}: there is no prompt.")
            return None
        if "sampler" in fields:
            fields["sampler"] = self._sampler(str(fields["sampler"]), where)
        prompt = PreviewPrompt(**fields)  # type: ignore[arg-type]  # _KEYS has each field's type
        self._check_values(prompt, where)
        return replace(
            prompt,
            width=_side(prompt.width),
            height=_side(prompt.height),
            steps=min(1000, max(1, prompt.steps)),
        )

    def _check_values(self, prompt: PreviewPrompt, where: str) -> None:
        problems = self.problems
        if prompt.seed is not None and not 0 <= prompt.seed < 2**64:
            problems.add(f"{where}: the seed {prompt.seed} must be 0 or more, and below 2^64.")
        if prompt.shift <= 0:
            problems.add(f"{where}: the shift {prompt.shift:g} must be above 0.")
        if max(prompt.width, prompt.height) > LARGEST_SIDE:
            problems.add(
                f"{where}: {prompt.width}x{prompt.height} is too large; {LARGEST_SIDE} pixels a side is the most."
            )

    def _sampler(self, name: str, where: str) -> str | None:
        """The sampler of that name; None for one that is ignored or unknown."""
        if name not in self.samplers and name in self.other_samplers:
            self.unsupported[f"--ss {name}"] = "a sampler for older models"
        elif name not in self.samplers:
            self.problems.add(f"{where}: sampler {name!r} is not one of {', '.join(self.samplers)}.")
        return self.samplers.get(name)


def _integer(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(cast("int", value))  # TypeError is the caller's


def _finite(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # TypeError is the caller's
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


_NUMBERS: dict[type, Callable[[object], float]] = {int: _integer, float: _finite}


def _side(pixels: int) -> int:
    """The nearest multiple of 16, at least 64."""
    return max(SMALLEST_SIDE, (pixels + SIDE_MULTIPLE // 2) // SIDE_MULTIPLE * SIDE_MULTIPLE)
