"""What a resume compares, what may be shown, and what goes into metadata and commands: views of the rows."""

from __future__ import annotations

import argparse
import shlex

import pytest

from library.options.option import Kind, Option, path
from library.options.resolve import resolve_options
from library.options.table import BY_NAME, OPTIONS
from library.options.values import (
    again_command,
    determining_options,
    metadata_options,
    modelspec_options,
    resume_command,
    secret_values,
    shared_options,
    split_options,
)

WHOLE = "--pretrained_model_name_or_path m --output_dir o --network_module networks.lora_sd3 --dataset_config d"
SECRETS = "--wandb_api_key hush --huggingface_token hush"


def resolved(line: str = "") -> argparse.Namespace:
    return resolve_options([*WHOLE.split(), *shlex.split(line)]).args


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if not option.turns_off], ids=lambda option: option.name
)
def test_resume_compares_exactly_what_is_not_resume_safe(option: Option) -> None:
    assert (option.dest in determining_options(resolved())) == (not option.resume_safe)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("learning_rate", False),
        ("network_dim", False),
        ("train_batch_size", False),
        ("lr_scheduler", False),
        ("output_dir", True),
        ("max_train_steps", True),
        ("gradient_checkpointing", True),
        ("seed", True),  # the one in force is compared
        ("report", True),
        ("no_report", True),
        ("metadata_title", True),
    ],
)
def test_an_option_that_decides_the_weights_is_not_resume_safe(name: str, safe: bool) -> None:
    assert BY_NAME[name].resume_safe == safe


def test_no_view_shows_a_secret() -> None:
    args = resolved(SECRETS)
    views = (determining_options, shared_options, split_options, metadata_options, modelspec_options)
    shown = " ".join(repr(view(args)) for view in views) + resume_command(args, 1)
    assert "hush" not in shown and "wandb_api_key" not in shown and "huggingface_token" not in shown
    assert secret_values(args) == ("hush", "hush") and secret_values(resolved()) == ()


def test_shared_options_have_no_path() -> None:
    shared = shared_options(resolved("--resume auto --seed 3"))
    assert shared["seed"] == 3 and list(shared) == sorted(shared)
    assert not {option.dest for option in OPTIONS if option.type is path} & set(shared) and "resume" not in shared


def test_options_are_split_by_whether_they_have_their_default() -> None:
    changed, default = split_options(resolved("--seed 3 --no_report"))
    assert changed["seed"] == "3" and changed["report"] == "False" and default["network_dim"] == "None"
    assert not set(changed) & set(default)
    works = {option.name for option in OPTIONS if option.kind is Kind.WORKS and not option.secret}
    assert set(changed) | set(default) == works - {"no_report"}


def test_metadata_has_the_values_in_force_under_their_keys() -> None:
    args = resolved("--learning_rate 1e-4 --metadata_author me --weighting_scheme mode")
    metadata, modelspec = metadata_options(args), modelspec_options(args)
    assert metadata["ss_learning_rate"] == 1e-4 and metadata["ss_weighting_scheme"] == "mode"
    assert modelspec["author"] == "me" and modelspec["license"] is None
    assert all(key.startswith("ss_") for key in metadata) and "title" not in modelspec
    assert len(metadata) + len(modelspec) == sum(option.in_metadata for option in OPTIONS)


def test_the_resume_command_repeats_the_options_and_goes_on_from_the_newest_state() -> None:
    line = "--use_8bit_adam --network_args a=1 'b=x y' --initial_step 5 --no_report --caption_extention txt --sdpa --dry_run"
    words = shlex.split(resume_command(resolved(line), 1).replace("\\\n", ""))
    assert words[:2] == ["python", "sd3_train_network.py"] and words[-2:] == ["--resume", "auto"]
    args, again = resolved(line), resolve_options(words[2:]).args
    assert determining_options(args) == {**determining_options(again), "sdpa": True, "use_8bit_adam": True} | {
        "caption_extention": "txt"
    }
    assert not {"--dry_run", "--initial_step", "--use_8bit_adam", "--caption_extention", "--sdpa"} & set(words)
    assert "--no_report" in words and words[words.index("--network_args") + 2] == "b=x y"
    more = shlex.split(again_command(resolved(f"{line} --output_name cat"), 1).replace("\\\n", ""))
    assert more[more.index("--output_name") + 1] == "cat_2" and "--resume" not in more
    launched = shlex.split(resume_command(args, 2).replace("\\\n", ""))
    assert launched[:5] == ["accelerate", "launch", "--num_processes", "2", "sd3_train_network.py"]
