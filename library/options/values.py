"""Views of the options in force: what a resume must repeat, what may be shown, what goes into metadata and commands.

Each is decided by fields of the option's row (`library.options.option.Option`), never by a list of names.
"""

from __future__ import annotations

import argparse
import shlex

from library.options.option import Kind, Option, path
from library.options.table import OPTIONS


def determining_options(args: argparse.Namespace) -> dict[str, object]:
    """The options that decide the weights, by dest: a resumed run must have the same values.

    The seed is not among them, since a run may draw its own; the one in force is compared by who knows it.
    """
    return {
        option.dest: getattr(args, option.dest)
        for option in OPTIONS
        if not (option.resume_safe or option.turns_off or option.secret)
    }


def shared_options(args: argparse.Namespace) -> dict[str, object]:
    """The options that may be shown to others: no secret, and no path, which would tell names of people and machines."""
    return {
        option.dest: getattr(args, option.dest)
        for option in sorted(OPTIONS, key=lambda each: each.dest)
        if not (option.secret or option.turns_off or option.type is path or option.name == "resume")
    }


def secret_values(args: argparse.Namespace) -> tuple[str, ...]:
    """The values of secret options, for those who must keep them out of what they write."""
    values = [getattr(args, option.dest) for option in OPTIONS if option.secret]
    return tuple(value for value in values if value)


def split_options(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Options with values other than their defaults, and those at their defaults. No secret is among them."""
    changed: dict[str, str] = {}
    default: dict[str, str] = {}
    for option in OPTIONS:
        if not option.secret and not option.turns_off and option.kind is Kind.WORKS:
            value = getattr(args, option.dest)
            (default if value == option.default else changed)[option.name] = str(value)
    return changed, default


def metadata_options(args: argparse.Namespace) -> dict[str, object]:
    """The values that a LoRA file records under `ss_<name>`, by that key."""
    return {f"ss_{option.name}": getattr(args, option.dest) for option in _in_metadata() if not _is_modelspec(option)}


def modelspec_options(args: argparse.Namespace) -> dict[str, object]:
    """The values that a LoRA file records under `modelspec.<key>`, by that key: of options --metadata_<key>."""
    return {
        option.name.removeprefix("metadata_"): getattr(args, option.dest)
        for option in _in_metadata()
        if _is_modelspec(option)
    }


def resume_command(args: argparse.Namespace, processes: int) -> str:
    """The command that goes on from the newest state. Secrets are left out and must be added."""
    return _lines([*_command(args, processes), "--resume", "auto"])


def again_command(args: argparse.Namespace, processes: int) -> str:
    """The command that trains once more from the start, under a name of its own. Secrets are left out and must be added."""
    return _lines(_command(args, processes, f"{args.output_name or 'last'}_2"))


def _command(args: argparse.Namespace, processes: int, output_name: str | None = None) -> list[str]:
    """The words that start this run. output_name: another one than the run's."""
    words = ["accelerate", "launch", "--num_processes", str(processes)] if processes > 1 else ["python"]
    words.append("sd3_train_network.py")
    for option in OPTIONS:
        if not option.secret and option.kind is Kind.WORKS and option.in_resume_command:
            is_name = option.dest == "output_name" and output_name is not None
            words += _words(option, output_name if is_name else getattr(args, option.dest))
    return words


def _lines(words: list[str]) -> str:
    return shlex.join(words).replace(" --", " \\\n  --")


def _in_metadata() -> list[Option]:
    return [option for option in OPTIONS if option.in_metadata and not option.secret]


def _is_modelspec(option: Option) -> bool:
    return option.name.startswith("metadata_")


def _words(option: Option, value: object) -> list[str]:
    """The words that set the option to its value; none where that is the default."""
    if option.turns_off:
        return [option.flag] if value is False else []
    if value is None or value == option.default:
        return []
    if option.is_switch:
        return [option.flag] if value else []
    return [option.flag, *(str(each) for each in (value if isinstance(value, list) else [value]))]
