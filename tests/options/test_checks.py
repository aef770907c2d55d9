"""Conflicts between options, ranges, and the options that do nothing or are not there yet."""

from __future__ import annotations

import pytest

from library.options.checks import check_options
from library.options.normalize import normalize_options
from library.options.option import Kind, Option, finite, int_or_auto
from library.options.parser import parse_arguments
from library.options.resolve import ResolvedOptions, resolve_options
from library.options.table import BY_NAME, OPTIONS

REQUIRED = [option.name for option in OPTIONS if option.required]
NEEDS = {option.name: option.requires for option in OPTIONS if option.requires}
USELESS_WITHOUT = {option.name: option.useless_without for option in OPTIONS if option.useless_without}
USELESS_WITH = {option.name: option.replaced_by for option in OPTIONS if option.replaced_by}
EXCLUDES = [(option.name, other) for option in OPTIONS for other in option.excludes]
RANGES = [option.name for option in OPTIONS if option.has_range]
EVERY = [option.name for option in OPTIONS if option.zero_is_off]
WHOLE = [
    "--pretrained_model_name_or_path=m",
    "--output_dir=o",
    "--network_module=networks.lora_sd3",
    "--dataset_config=d",
]
GUIDE = (
    "--pretrained_model_name_or_path=m --clip_l= --clip_g= --t5xxl= --dataset_config=my_sd3_dataset_config.toml --output_dir=o "
    "--output_name=my_sd3_lora --save_model_as=safetensors --network_module=networks.lora --network_dim=16 --network_alpha=1 "
    "--learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa --max_train_epochs=10 "
    "--save_every_n_epochs=1 --mixed_precision=fp16 --gradient_checkpointing --weighting_scheme=sigma_sqrt --blocks_to_swap=32"
)


def resolved(line: str = "") -> ResolvedOptions:
    return resolve_options([*WHOLE, *line.split()])


def example(dest: str) -> list[str]:
    """Words that give the option a value other than its default, within its limits."""
    option = BY_NAME[dest]
    if option.is_switch:
        return [f"{option.flag}={'false' if option.default else 'true'}"]
    if option.choices:
        return [option.flag, str(next(each for each in option.choices if each != option.default))]
    return [option.flag, "3" if option.type in (int, finite, int_or_auto) else "x"]


def test_guides_command_has_no_problem_and_says_what_it_changes() -> None:
    options = resolve_options(GUIDE.split())
    assert options.problems == [] and len(options.warnings) == 2
    assert options.args.network_module == "networks.lora_sd3" and options.args.clip_l is None
    assert any("--sdpa changes nothing" in warning for warning in options.warnings)


def test_defaults_are_right_but_for_what_must_be_given() -> None:
    problems = resolve_options([]).problems
    assert [problem.split()[0] for problem in problems] == [f"--{dest}" for dest in REQUIRED]
    assert resolved().problems == [] and resolved().warnings == []


@pytest.mark.parametrize("dest", REQUIRED)
def test_an_empty_text_does_not_count_as_given(dest: str) -> None:
    assert any(f"--{dest} is missing" in problem for problem in resolved(f"--{dest}=").problems)


@pytest.mark.parametrize("option", [each for each in OPTIONS if each.kind is not Kind.WORKS], ids=lambda o: o.name)
def test_an_option_without_effect_warns_once_and_a_refused_one_is_a_problem(option: Option) -> None:
    options = resolve_options([*WHOLE, *example(option.name)])
    told = [f"{option.flag} {'is refused' if option.kind is Kind.REFUSED else 'changes nothing'}: {option.reason}."]
    assert (options.problems, options.warnings) == ((told, []) if option.kind is Kind.REFUSED else ([], told))


@pytest.mark.parametrize("dest", NEEDS)
def test_an_option_that_needs_another_says_so(dest: str) -> None:
    said = f"--{dest} needs --{NEEDS[dest][0]}"
    assert any(problem.startswith(said) for problem in resolve_options([*WHOLE, *example(dest)]).problems)
    for other in NEEDS[dest]:
        problems = resolve_options([*WHOLE, *example(dest), *example(other)]).problems
        assert not any(problem.startswith(said) for problem in problems)


@pytest.mark.parametrize("dest", USELESS_WITHOUT)
def test_an_option_that_does_nothing_without_another_warns(dest: str) -> None:
    words = [word for word in WHOLE if "dataset" not in word]
    said = f"--{dest} changes nothing without --{USELESS_WITHOUT[dest][0]}"
    assert any(warning.startswith(said) for warning in resolve_options([*words, *example(dest)]).warnings)
    for other in USELESS_WITHOUT[dest]:
        warnings = resolve_options([*words, *example(dest), *example(other)]).warnings
        assert not any(warning.startswith(said) for warning in warnings)


@pytest.mark.parametrize(("one", "other"), EXCLUDES)
def test_options_that_exclude_each_other_are_a_problem_together_alone(one: str, other: str) -> None:
    said = f"--{one} and --{other} can't be combined"
    both = resolve_options([*WHOLE, *example(one), *example(other)]).problems
    assert sum(problem.startswith(said) for problem in both) == 1
    for single in (one, other):
        assert not any(
            "can't be combined" in problem for problem in resolve_options([*WHOLE, *example(single)]).problems
        )


@pytest.mark.parametrize("dest", USELESS_WITH)
def test_an_option_that_another_replaces_is_told(dest: str) -> None:
    other = USELESS_WITH[dest]
    said = f"--{dest} changes nothing with --{other}."
    assert said in resolve_options([*WHOLE, *example(dest), *example(other)]).warnings
    assert not any("changes nothing with --" in told for told in resolve_options([*WHOLE, *example(dest)]).warnings)


def test_the_tables_are_whole() -> None:
    """The rows name so many ranges and relations; none is lost by moving a row."""
    numbers = (
        len(RANGES),
        len(REQUIRED),
        len(NEEDS),
        len(USELESS_WITHOUT),
        len(USELESS_WITH),
        len(EXCLUDES),
        len(EVERY),
    )
    assert numbers == (39, 3, 10, 23, 5, 9, 7)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_what_a_row_says_of_others_and_of_its_range_makes_sense(option: Option) -> None:
    others = {*option.requires, *option.useless_without, *option.excludes} | ({option.replaced_by} - {""})
    assert others <= {each.dest for each in OPTIONS} - {option.dest}
    low = [bound for bound in (option.min, option.above) if bound is not None]
    high = [bound for bound in (option.max, option.below) if bound is not None]
    assert len(low) <= 1 and len(high) <= len(low)
    assert not option.has_range or option.type in (int, finite, int_or_auto)
    assert option.default is None or option.type not in (int, finite) or option.in_range(option.default)
    assert (option.reason != "") == (option.kind is not Kind.WORKS)
    assert not option.secret or (option.resume_safe and not option.in_metadata)


@pytest.mark.parametrize("dest", RANGES)
def test_a_number_out_of_its_range_is_a_problem_and_the_limit_itself_is_not(dest: str) -> None:
    option = BY_NAME[dest]
    whole = option.type is not finite
    step = 1 if whole else 0.001
    low = option.min if option.above is None else option.above
    high = option.max if option.below is None else option.below
    assert low is not None

    def told(value: float) -> bool:
        text = f"{value:.0f}" if whole else repr(value)
        return any(problem.startswith(f"--{dest} must be ") for problem in resolved(f"--{dest}={text}").problems)

    assert told(low - step)
    assert told(low) == (option.above is not None) and not told(low + step)
    if high is not None:
        assert told(high + step)
        assert told(high) == (option.below is not None)


def test_a_range_reads_well() -> None:
    assert Option("--x", "", "", int, min=1).range_text() == "1 or more"
    assert Option("--x", "", "", finite, above=0, below=1).range_text() == "above 0 and below 1"
    assert Option("--x", "", "", int, min=1, max=512).range_text() == "1 or more and at most 512"
    assert BY_NAME["seed"].range_text() == "0 or more and at most 4294967295"


def test_each_of_several_values_is_checked() -> None:
    assert resolved("--text_encoder_lr 1e-4 -1 0").problems == ["--text_encoder_lr must be 0 or more, but it is -1.0."]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--full_fp16", "--full_fp16 needs --mixed_precision fp16, but that is no."),
        ("--full_bf16 --mixed_precision fp16", "--full_bf16 needs --mixed_precision bf16, but that is fp16."),
        ("--use_8bit_adam --optimizer_type Lion", "--use_8bit_adam means AdamW8bit, but --optimizer_type is Lion."),
        ("--use_lion_optimizer --optimizer_type SGD", "--use_lion_optimizer means Lion, but --optimizer_type is SGD."),
        ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam and --use_lion_optimizer can't be combined"),
        ("--log_with tensorboard", "--log_with tensorboard needs --logging_dir"),
        ("--log_with all", "--log_with all needs --logging_dir"),
        (
            "--base_weights a --base_weights_multiplier 1 2",
            "--base_weights_multiplier has 2 values for 1 --base_weights",
        ),
        ("--output_name a/b", "--output_name a/b must be a name without folders"),
        ("--cache_latents_to_disk --random_crop", "--cache_latents and --random_crop can't be combined"),
        ("--fp8_base_unet --base_quantization nf4", "--fp8_base and --base_quantization can't be combined"),
        ("--blocks_to_swap auto --cpu_offload_checkpointing", "--blocks_to_swap and --cpu_offload_checkpointing can't"),
    ],
)
def test_a_contradiction_is_one_problem(line: str, said: str) -> None:
    (problem,) = resolved(line).problems
    assert problem.startswith(said)


def test_resume_auto_and_the_hub_exclude_each_other() -> None:
    assert any(
        "--resume auto looks in" in each for each in resolved("--resume auto --resume_from_huggingface").problems
    )


@pytest.mark.parametrize(
    "line", ["--log_with wandb", "--full_bf16 --mixed_precision bf16", "--use_8bit_adam", "--seed 0"]
)
def test_what_fits_is_no_problem(line: str) -> None:
    assert resolved(line).problems == []


@pytest.mark.parametrize(
    ("line", "dest", "value"),
    [
        ("--cache_latents_to_disk", "cache_latents", True),
        ("--cache_text_encoder_outputs_to_disk", "cache_text_encoder_outputs", True),
        ("--caption_extention txt", "caption_extension", ".txt"),
        ("--caption_extension .txt", "caption_extension", ".txt"),
        ("--use_8bit_adam", "optimizer_type", "AdamW8bit"),
        ("--use_lion_optimizer", "optimizer_type", "Lion"),
        ("", "optimizer_type", "AdamW"),
        ("--network_module networks.lora", "network_module", "networks.lora_sd3"),
        ("--network_module lycoris.kohya", "network_module", "lycoris.kohya"),
        ("--vae=", "vae", None),
        ("--network_args", "network_args", None),
        ("--caption_separator=", "caption_separator", ""),
        ("--fp8_base_unet", "fp8_base", True),
        ("--logging_dir l", "log_with", "tensorboard"),
        ("--logging_dir l --log_with wandb", "log_with", "wandb"),
        ("", "sample_sampler", "euler"),
        ("--sample_sampler heun", "sample_sampler", "heun"),
        ("--sample_sampler pndm", "sample_sampler", "euler"),
    ],
)
def test_implied_value(line: str, dest: str, value: object) -> None:
    assert getattr(resolved(line).args, dest) == value


def test_a_sampler_of_older_models_warns_and_the_default_does_not() -> None:
    assert any("previews use euler" in warning for warning in resolved("--sample_sampler euler_a").warnings)
    assert not any("sampler" in warning for warning in resolved("--sample_sampler k_euler").warnings)


@pytest.mark.parametrize("dest", EVERY)
def test_an_interval_of_zero_is_never(dest: str) -> None:
    args = parse_arguments([f"--{dest}", "0"])
    before = dict(vars(args))
    normalized, notes = normalize_options(args)
    assert notes == [f"--{dest} 0 turns it off: intervals count from 1."] and vars(args) == before
    assert getattr(normalized, dest) is None and not any(dest in problem for problem in check_options(normalized)[0])


def test_preview_prompts_without_an_interval_are_a_warning():
    words = ["--sample_prompts", "prompts.txt"]
    text = "--sample_prompts changes nothing without --sample_every_n_epochs or --sample_every_n_steps"
    assert any(text in warning for warning in resolve_options(words).warnings)
    assert not any(text in warning for warning in resolve_options([*words, "--sample_at_first"]).warnings)
    assert any("--v_parameterization changes nothing" in w for w in resolve_options(["--v_parameterization"]).warnings)
