"""The command line: sd-scripts' 218 options, the new ones, their classes, and what is said of a wrong line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from library.common.errors import UserError
from library.options.option import Kind, Option, finite, int_or_auto, int_or_float, path
from library.options.parser import build_parser, parse_arguments
from library.options.table import BY_NAME, GROUPS, OPTIONS, option_class

ORIGINAL: list[dict[str, Any]] = json.loads(Path(__file__).with_name("sd_scripts_options.json").read_text())
TYPES = {str: "str", path: "str", int: "int", finite: "float", int_or_float: "int_or_float", bool: "bool"}
# Where we take more than sd-scripts does: its values are all taken too.
WIDER_CHOICES = {"resize_interpolation", "t5xxl_dtype"}
WIDER_TYPES = {"blocks_to_swap": int_or_auto}
PATH_AS_TEXT = {"dataset_config"}

NO_EFFECT = {
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "ddp_gradient_as_bucket_view",
    "ddp_static_graph",
    "v2",
    "max_token_length",
    "mem_eff_attn",
    "xformers",
    "sdpa",
    "clip_skip",
    "noise_offset",
    "noise_offset_random_strength",
    "v_parameterization",
    "multires_noise_iterations",
    "multires_noise_discount",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "adaptive_noise_scale",
    "zero_terminal_snr",
    "min_snr_gamma",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "debiased_estimation_loss",
}
REFUSED = {
    "weighted_captions",
    "fused_backward_pass",
    "dataset_class",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "fp16_master_weights_and_gradients",
}
NEW = {
    "allow_external_links",
    "timestep_sampling",
    "loss_weighting",
    "resolution_shift",
    "text_cache_variants",
    "cache_dir",
    "skip_bad_images",
    "dry_run",
    "gradient_checkpointing_blocks",
    "selective_checkpointing",
    "lean_activations",
    "base_quantization",
    "fp8_matmul",
    "memory_plan",
    "vram",
    "save_every_n_minutes",
    "report",
    "no_report",
    "save_format",
    "ema_decay",
    "ema_save",
    "max_nonfinite_steps",
}
EXAMPLES: dict[Any, tuple[str, Any]] = {
    int: ("7", 7),
    int_or_auto: ("auto", "auto"),
    finite: ("-0.25", -0.25),
    int_or_float: ("10%", 0.1),
    str: ("a b", "a b"),
    path: ("a/b.c", "a/b.c"),
}
ids = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)


def words_and_value(option: Option) -> tuple[list[str], Any]:
    """A command line that gives the option a value other than its default, and that value."""
    if option.is_switch:
        if option.default and not option.turns_off:
            return [f"{option.flag}=false"], False
        return [option.flag], not option.turns_off
    if option.choices:
        chosen = next(each for each in option.choices if each != option.default)
        return [option.flag, str(chosen)], chosen
    text, value = EXAMPLES[option.type]
    return [option.flag, text], [value] if option.nargs else value


def test_every_original_option_is_here_and_every_other_one_is_known_to_be_new() -> None:
    assert len(ORIGINAL) == 218
    assert {fact["flag"].removeprefix("--") for fact in ORIGINAL} | NEW == set(BY_NAME)
    assert len(OPTIONS) == len(BY_NAME)


@pytest.mark.parametrize("fact", ORIGINAL, ids=lambda fact: fact["flag"])
def test_original_option_has_its_type_default_choices_and_number_of_values(fact: dict[str, Any]) -> None:
    option = BY_NAME[fact["flag"].removeprefix("--")]
    if option.name in WIDER_TYPES:
        assert option.type is WIDER_TYPES[option.name]
    else:
        assert TYPES[option.type] == ("str" if option.name in PATH_AS_TEXT else fact["type"])
    assert option.default == fact["default"] and type(option.default) is type(fact["default"])
    choices, ours = fact.get("choices", []), list(option.choices or [])
    assert set(choices) <= set(ours) if option.name in WIDER_CHOICES else choices == ours
    assert option.nargs == fact.get("nargs")


@ids
def test_argparse_has_the_option_as_the_table_says(option: Option) -> None:
    action = next(each for each in build_parser()._actions if option.flag in each.option_strings)
    assert action.dest == option.dest and action.default == option.default and action.nargs in (option.nargs, 0)
    if not option.is_switch:
        assert action.type is option.type and list(action.choices or []) == list(option.choices or [])


@ids
def test_an_option_given_alone_changes_its_own_value_and_nothing_else(option: Option) -> None:
    words, value = words_and_value(option)
    expected = {each.dest: each.default for each in OPTIONS} | {option.dest: value}
    assert value != option.default
    assert vars(parse_arguments(words)) == expected
    if not words[0].endswith("=false"):
        assert vars(build_parser().parse_args(words)) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([option for option in OPTIONS if option.name != "report"]), max_size=12), st.booleans())
def test_any_valid_line_is_read_as_argparse_reads_it(chosen: list[Option], inline: bool) -> None:
    line = []
    for option in chosen:
        words, _ = words_and_value(option)
        line += ["=".join(words)] if inline and not option.nargs else words
    ours, argparse_reads = vars(parse_arguments(line)), vars(build_parser().parse_args(line))
    assert ours == argparse_reads


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from([option.flag for option in OPTIONS])), max_size=6))
def test_nothing_but_a_user_error_comes_of_a_wrong_line(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        return
    try:
        parse_arguments(words)
    except UserError as error:
        assert error.problems and all(problem.endswith((".", "?")) for problem in error.problems)


def test_class_of_every_option() -> None:
    found = {kind: {name for name in BY_NAME if option_class(name) is kind} for kind in Kind}
    assert found[Kind.NO_EFFECT] == NO_EFFECT
    assert found[Kind.REFUSED] == REFUSED
    assert all(option.reason for option in OPTIONS if option.kind is not Kind.WORKS)
    with pytest.raises(KeyError):
        option_class("no_such_option")


def test_help_shows_classes_in_groups_of_their_own() -> None:
    titles = [group.title for group in GROUPS]
    assert titles[-2:] == ["Accepted, without effect on SD3", "Refused"] and len(set(titles)) == len(titles)
    for group in GROUPS:
        expected = {titles[-2]: Kind.NO_EFFECT, titles[-1]: Kind.REFUSED}.get(group.title, Kind.WORKS)
        assert {option.kind for option in group.options} == {expected}, group.title
    text = build_parser().format_help()
    assert all(f"\n{title}:\n" in text for title in titles)


@ids
def test_every_option_says_what_it_does_in_a_sentence(option: Option) -> None:
    assert len(option.help) > 10 and option.help.endswith(".")
    assert option.help[0].isupper() or option.help.startswith(("auto", "public"))
    assert not option.reason.endswith(".")


def test_help_answers_in_time_without_torch_and_exits_with_0() -> None:
    code = (
        "import sys\nfrom library.options.resolve import resolve_options\n"
        "try: resolve_options(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 1.5
    assert done.stdout.endswith("0 False\n") and "--network_module" in done.stdout and "1.29." in done.stdout


def test_several_values_and_special_words() -> None:
    line = "--network_args emb_dims=[1,2] verbose=True --text_encoder_lr 1e-4 0 2 --blocks_to_swap auto --no_report --sdpa=false"
    line += " --lr_warmup_steps 100 --lr_decay_steps 0.1 --logit_mean -1e-1 --resize_interpolation box --resume=auto"
    args = parse_arguments([*line.split(), "--dataset_config", "", "--caption_prefix", "-- a photo of"])
    assert args.network_args == ["emb_dims=[1,2]", "verbose=True"] and args.text_encoder_lr == [1e-4, 0.0, 2.0]
    assert args.blocks_to_swap == "auto" and args.report is False and args.sdpa is False and args.resume == "auto"
    assert args.lr_warmup_steps == 100 and type(args.lr_warmup_steps) is int and args.lr_decay_steps == 0.1
    assert args.logit_mean == -0.1 and args.dataset_config == "" and args.caption_prefix == "-- a photo of"


def test_all_problems_of_a_line_are_told_at_once() -> None:
    line = "lost --learning_rte 1 2 --network_dim x --loss_type l3 --seed --sdpa=maybe --huber_c nan --network-alpha=1"
    with pytest.raises(UserError) as caught:
        parse_arguments([*line.split(), "--v2", "stray"])
    stray = "belongs to no option. Put values with spaces in quotes, and end a line with \\ alone."
    assert caught.value.problems == [
        f"'lost' {stray}",
        "--learning_rte is not an option. Did you mean --learning_rate?",
        "--network_dim: it must be a whole number, but it is 'x'.",
        "--loss_type: it must be one of l1, l2, huber, smooth_l1, but it is 'l3'.",
        "--seed: its value is missing.",
        "--sdpa: it is on or off: give it alone, or with =true or =false, not 'maybe'.",
        "--huber_c: it must be a number, but it is 'nan'.",
        caught.value.problems[7],
        f"'stray' {stray}",
    ]
    assert caught.value.problems[7].startswith("--network-alpha is not an option. Did you mean --network_alpha")


def test_a_word_too_many_after_a_wrong_value_is_told_too() -> None:
    for line in ("--network_dim x stray", "--network_dim=x stray", "--sdpa=maybe stray", "--sdpa=true stray --seed x"):
        with pytest.raises(UserError) as caught:
            parse_arguments(line.split())
        assert len(caught.value.problems) == 2 and any(each.startswith("'stray'") for each in caught.value.problems)


@pytest.mark.parametrize("line", ["-- x", "--", "x -- y --seed 1", "--learning_rte=1 a --seed=1"])
def test_words_after_what_is_no_option(line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(line.split())
    no_option = sum("is not an option" in problem for problem in caught.value.problems)
    strays = sum("belongs to no option" in problem for problem in caught.value.problems)
    assert (no_option, strays) == (1, 1 if line[0] in "x" or "=1 a" in line else 0)


@pytest.mark.parametrize("words", [["--logit_mean", "-1e-4"], ["--text_encoder_lr", "-1e-4", "-.5"], ["--seed=-3"]])
def test_numbers_below_zero_are_values(words: list[str]) -> None:
    option = BY_NAME[words[0].partition("=")[0][2:]]
    value = getattr(parse_arguments(words), option.dest)
    assert value == {"logit_mean": -1e-4, "text_encoder_lr": [-1e-4, -0.5], "seed": -3}[option.name]


@pytest.mark.parametrize(("typed", "meant"), [("--netwrk_dim", "--network_dim"), ("--lr_shedule", "--lr_scheduler")])
def test_nearest_names_are_offered(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"Did you mean .*{meant}"):
        parse_arguments([typed, "1"])


def test_an_abbreviation_is_not_taken_for_an_option() -> None:
    with pytest.raises(UserError, match=r"--network_mod is not an option\. Did you mean --network_module"):
        parse_arguments(["--network_mod", "x"])


@pytest.mark.parametrize("text", ["1.5x", "", "%", "nan%", "inf"])
def test_wrong_step_counts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="a number of steps, a fraction or a percentage"):
        parse_arguments([f"--lr_warmup_steps={text}"])


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1.0", 1), ("0", 0), ("0.5", 0.5), ("100%", 1.0), ("2.5", 2.5)])
def test_step_counts_and_fractions_are_told_apart(text: str, value: float) -> None:
    read = int_or_float(text)
    assert read == value and type(read) is type(value)
