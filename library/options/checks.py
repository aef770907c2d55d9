"""What is wrong with options as such: conflicts that show without a model, a dataset or a device.

What concerns one option is in its row; here are the sentences, and what concerns several. The packages that know the formulas check
timesteps, loss, schedule, optimizer, learning rates and the dataset.
"""

from __future__ import annotations

import argparse

from library.options.option import Kind, Option
from library.options.table import BY_NAME, OPTIONS

LARGEST_COUNT = 2**31 - 1
"""Of steps, images and all else that is counted: beyond it nothing ends, and arithmetic overflows."""

LONGEST_NAME = 180  # bytes of --output_name


def check_options(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Problems and warnings of normalized options, one or two sentences each."""
    problems = [
        *_required(args),
        *_refused(args),
        *_needs(args),
        *_excludes(args),
        *_precision(args),
        *_names(args),
        *_out_of_range(args),
    ]
    return problems, [*_without_effect(args), *_useless(args)]


def is_set(args: argparse.Namespace, dest: str) -> bool:
    """Whether the option's value differs from its default."""
    return bool(getattr(args, dest) != BY_NAME[dest].default)


def _required(args: argparse.Namespace) -> list[str]:
    return [
        f"--{option.dest} is missing: {option.required}."
        for option in OPTIONS
        if option.required and not getattr(args, option.dest)
    ]


def _refused(args: argparse.Namespace) -> list[str]:
    return [f"{option.flag} is refused: {option.reason}." for option in _set_options(args, Kind.REFUSED)]


def _without_effect(args: argparse.Namespace) -> list[str]:
    return [f"{option.flag} changes nothing: {option.reason}." for option in _set_options(args, Kind.NO_EFFECT)]


def _needs(args: argparse.Namespace) -> list[str]:
    return [
        f"--{option.dest} needs {_either(option.requires)}."
        for option in _set_options(args)
        if option.requires and not _any_set(args, option.requires)
    ]


def _useless(args: argparse.Namespace) -> list[str]:
    options = _set_options(args)
    lacking = [
        f"--{option.dest} changes nothing without {_either(option.useless_without)}."
        for option in options
        if option.useless_without and not _any_set(args, option.useless_without)
    ]
    replaced = [
        f"--{option.dest} changes nothing with --{option.replaced_by}."
        for option in options
        if option.replaced_by and is_set(args, option.replaced_by)
    ]
    return lacking + replaced + _nothing_left_to_be_lean(args)


def _out_of_range(args: argparse.Namespace) -> list[str]:
    """One sentence for each option whose value, or one of whose values, is out of range."""
    problems = []
    for option in OPTIONS:
        value = getattr(args, option.dest)
        for each in value if isinstance(value, list) else [value]:
            if option.has_range and each is not None and each != "auto" and not option.in_range(each):
                problems.append(f"--{option.dest} must be {option.range_text()}, but it is {each}.")
            elif isinstance(each, int) and option.max is None and abs(each) > LARGEST_COUNT:
                problems.append(
                    f"--{option.dest} must be at most {LARGEST_COUNT}, the largest count, but it is {each}."
                )
    return problems


def _nothing_left_to_be_lean(args: argparse.Namespace) -> list[str]:
    checkpointed = args.gradient_checkpointing or args.selective_checkpointing or args.cpu_offload_checkpointing
    if not args.lean_activations or not checkpointed or args.gradient_checkpointing_blocks or args.memory_plan:
        return []
    return [
        "--lean_activations changes nothing where all blocks are checkpointed: --gradient_checkpointing_blocks leaves some to it."
    ]


def _set_options(args: argparse.Namespace, kind: Kind | None = None) -> list[Option]:
    """The options whose values differ from their defaults: all of them, or those of one kind."""
    return [option for option in OPTIONS if kind in (None, option.kind) and is_set(args, option.dest)]


def _any_set(args: argparse.Namespace, dests: tuple[str, ...]) -> bool:
    return any(is_set(args, dest) for dest in dests)


def _either(dests: tuple[str, ...]) -> str:
    return " or ".join(f"--{dest}" for dest in dests)


def _excludes(args: argparse.Namespace) -> list[str]:
    return [
        f"--{option.dest} and --{other} can't be combined: {reason}. Leave one out."
        for option in _set_options(args)
        for other, reason in option.excludes.items()
        if is_set(args, other)
    ]


def _precision(args: argparse.Namespace) -> list[str]:
    return [
        f"--full_{name} needs --mixed_precision {name}, but that is {args.mixed_precision}."
        for name in ("fp16", "bf16")
        if getattr(args, f"full_{name}") and args.mixed_precision != name
    ]


def _names(args: argparse.Namespace) -> list[str]:
    """Options that would contradict a name, a count or a folder given elsewhere."""
    problems = []
    for legacy, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        both = args.use_8bit_adam and args.use_lion_optimizer  # the row of use_8bit_adam says so
        if not both and getattr(args, legacy) and args.optimizer_type.lower() != name.lower():
            problems.append(f"--{legacy} means {name}, but --optimizer_type is {args.optimizer_type}. Leave one out.")
    if args.log_with in ("tensorboard", "all") and not args.logging_dir:
        problems.append(f"--log_with {args.log_with} needs --logging_dir, the folder for the logs.")
    merged, strengths = len(args.base_weights or ()), len(args.base_weights_multiplier or ())
    if 0 < merged < strengths:
        problems.append(f"--base_weights_multiplier has {strengths} values for {merged} --base_weights.")
    if args.resume_from_huggingface and args.resume == "auto":
        problems.append("--resume auto looks in --output_dir; with --resume_from_huggingface name the state.")
    if args.output_name and {"/", "\\"} & set(args.output_name):
        problems.append(f"--output_name {args.output_name} must be a name without folders; those go to --output_dir.")
    return problems + _name_problems(args.output_name or "")


def _name_problems(name: str) -> list[str]:
    """Why a name can't begin the names of files: file systems take 255 bytes, and step, ending and temporary mark come to it."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return [f"--output_name {name!r} is not UTF-8 text. Choose another."]
    if length > LONGEST_NAME:
        return [f"--output_name is {length} bytes long, and {LONGEST_NAME} is the most. Shorten it."]
    if not all(map(str.isprintable, name)):
        return [f"--output_name {name!r} holds characters that can't be shown. Choose another."]
    return []
