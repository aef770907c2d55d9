"""A benchmark's step is the trainer's step: its sizes, its options, its work."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import load, peft_step, quantization, step, swap
from benchmarks.job import (
    PRESETS,
    Shape,
    add_sizes,
    conditioning_of,
    make_job,
    model_flops,
    random_model,
    sizes,
    training_options,
)
from library.common.errors import UserError
from library.common.transformer import StepShape
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.step_inputs import block_flops
from tests.sd3.real_sizes import MMDITS

CPU = torch.device("cpu")
TINY = [
    "--preset",
    "sd35m",
    "--depth",
    "3",
    "--hidden_size",
    "64",
    "--resolution",
    "64",
    "--steps",
    "1",
    "--device",
    "cpu",
]
SHORT = ["--t5xxl_max_token_length", "8"]


def config_of(*words: str) -> MMDiTConfig:
    parser = argparse.ArgumentParser()
    add_sizes(parser)
    return sizes(parser.parse_args(words))


def tiny_job(*words: str):
    args = training_options([*SHORT, *words])
    return make_job(config_of(*TINY[:6]), args, Shape.of(args, 64), CPU)


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_presets_are_the_released_models():
    assert PRESETS == MMDITS
    assert config_of("--preset", "sd35l") == MMDITS["sd35l"]


def test_a_smaller_model_keeps_the_kind():
    half = config_of("--preset", "sd35m", "--scale", "0.5")
    assert (half.depth, half.hidden_size, half.mlp_hidden_size) == (12, 768, 3072)
    assert half.dual_attention_blocks == tuple(range(6)) and half.kind == "5-medium"
    with pytest.raises(SystemExit, match="multiple of 64"):
        config_of("--hidden_size", "100")


def test_random_weights_keep_activations_in_bounds():
    job = tiny_job("--mixed_precision", "bf16")
    assert job.model.dtype == torch.bfloat16
    with torch.no_grad():
        velocity = job.model(job.batch.latents, torch.tensor([500.0]), *conditioning_of(job.batch))
    assert 0.05 < velocity.float().std() < 20
    assert not any(parameter.requires_grad for parameter in random_model(job.model.config, torch.float32).parameters())


def test_a_step_trains_the_lora_alone():
    job = tiny_job()
    base = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    before = [parameter.clone() for parameter in job.network.parameters()]
    for _ in range(3):
        report = job.step()
    assert report.progress.step == 3 and bool(torch.isfinite(report.loss)) and not report.nonfinite
    assert any(not torch.equal(one, two) for one, two in zip(before, job.network.parameters()))
    assert all(torch.equal(tensor, base[name]) for name, tensor in job.model.state_dict().items())


@pytest.mark.parametrize(
    "words",
    [
        "--blocks_to_swap 1 --gradient_checkpointing",
        "--gradient_checkpointing --cpu_offload_checkpointing --gradient_checkpointing_blocks 2",
        "--gradient_checkpointing --selective_checkpointing",
        "--lean_activations",
    ],
)
def test_memory_options_change_no_result(words: str):
    plain, job = tiny_job("--seed", "4"), tiny_job("--seed", "4", *words.split())
    for _ in range(2):
        expected, report = plain.step(), job.step()
    torch.testing.assert_close(report.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(report.gradient_norm, expected.gradient_norm, rtol=1e-5, atol=0)
    assert (job.swapper is not None) == ("swap" in words)


def test_the_trainers_own_checks_are_kept():
    for words, message in (
        ("--blocks_to_swap auto", "give --blocks_to_swap a number"),
        ("--no_such_option", "no_such_option"),
        ("--fp8_matmul", "fp8_base"),
        ("--blocks_to_swap 1 --cpu_offload_checkpointing", "can't be combined"),
    ):
        with pytest.raises(UserError, match=message):
            training_options(words.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_are_those_that_torch_counts_in_a_real_step(preset: str):
    config = config_of("--preset", preset, "--depth", "3", "--hidden_size", "64")
    args = training_options([*SHORT, "--train_batch_size", "2"])
    shape = Shape.of(args, 64)
    job = make_job(config, args, shape, CPU)
    job.step()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        job.step()
    assert model_flops(config, args, shape) == counter.get_total_flops()
    checkpointed = training_options([*SHORT, "--train_batch_size", "2", "--gradient_checkpointing"])
    assert model_flops(config, checkpointed, shape) == model_flops(config, args, shape)


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_of_real_widths_are_those_of_the_formula(preset: str):
    """Products cost once more in backward, for the gradient to the activations; attention twice more."""
    config, args = config_of("--preset", preset, "--depth", "2"), training_options([])
    shape = Shape.of(args, 1024)
    with torch.device("meta"):
        work = list(block_flops(MMDiT(config), StepShape(shape.batch, shape.height, shape.width, shape.text_tokens)))
    formula = sum(2 * block.matmul + 3 * block.attention for block in work)
    assert model_flops(config, args, shape) == pytest.approx(formula, rel=0.03)


def test_the_step_benchmark_reports_time_memory_and_work(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    step.main([*TINY, *SHORT, "--json", str(tmp_path / "step.json"), "--gradient_checkpointing"])
    row = rows_of(capsys)[0]
    assert row["what"] == "--t5xxl_max_token_length 8 --gradient_checkpointing"
    assert row["step_seconds"] > 0 and row["step_cpu_seconds"] > 0 and row["step_peak_mib"] > 100
    assert row["tflop_per_second"] == pytest.approx(row["tflop_a_step"] / row["step_seconds"])
    assert 0 < row["share_of_peak"] < 1.5
    assert json.loads((tmp_path / "step.json").read_text())["depth"] == 3


def test_the_step_of_diffusers_and_peft_does_the_same_work():
    chosen = peft_step.parser().parse_args([*TINY, *SHORT])
    their_step = peft_step.make_step(sizes(chosen), chosen, CPU)
    their_step()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        their_step()
    args = training_options(SHORT)
    mine = model_flops(sizes(chosen), args, Shape.of(args, 64))
    assert counter.get_total_flops() == pytest.approx(mine, rel=0.1)


def test_swapped_and_plain_steps_stand_side_by_side(capsys: pytest.CaptureFixture[str]):
    swap.main([*TINY[:2], "--depth", "5", *TINY[4:], *SHORT, "--blocks_to_swap", "3"])
    swapped, plain, copies, ratio = rows_of(capsys)
    assert ratio["step_seconds"] == pytest.approx(swapped["step_seconds"] / plain["step_seconds"])
    assert copies["gib_per_second"] > 0
    with pytest.raises(SystemExit, match="blocks_to_swap"):
        swap.main([*TINY, *SHORT])


def test_loading_is_reported_with_the_size_of_the_file(capsys: pytest.CaptureFixture[str]):
    load.main([*TINY[:6], "--rounds", "1", "--device", "cpu"])
    ours, plain, ratio = rows_of(capsys)
    assert ours["file_mib"] == plain["file_mib"] > 1 and ours["load_seconds"] > 0
    assert ratio["load_seconds"] == pytest.approx(ours["load_seconds"] / plain["load_seconds"])


def test_both_ways_of_loading_give_the_same_model(tmp_path: Path):
    chosen = load.parser().parse_args([*TINY[:6]])
    part = load.locate_parts(str(load.write_noise(tmp_path, chosen))).mmdit
    models = [way(part, torch.bfloat16, CPU).state_dict() for way in load.WAYS.values()]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_errors_of_quantized_weights_are_in_order(capsys: pytest.CaptureFixture[str]):
    quantization.main(["--depth", "2", "--hidden_size", "128", "--resolution", "64", "--device", "cpu", *SHORT])
    error = {row["what"]: row for row in rows_of(capsys)}
    assert set(error) == set(quantization.KINDS)
    for name, limit in (("bf16", 0.02), ("int8", 0.03), ("fp8", 0.08), ("fp8, --fp8_matmul", 0.1), ("nf4", 0.3)):
        assert 1e-4 < error[name]["velocity_error"] < limit
        assert 1e-4 < error[name]["gradient_error"] < 2 * limit
    assert error["nf4"]["blocks_mib"] < error["int8"]["blocks_mib"] < error["bf16"]["blocks_mib"]


def test_a_comparison_runs_both(capsys: pytest.CaptureFixture[str]):
    """The whole way: our step in a process of its own, another program beside it."""
    printed = json.dumps({"rows": [{"what": "x", "step_seconds": 1e-3}]})
    other = f'{sys.executable} -c \'print("""{printed}""")\''
    step.main([*TINY, *SHORT, "--rounds", "1", "--against", other])
    ours, against, ratio = rows_of(capsys)
    assert against["step_seconds"] == 1e-3
    assert ratio["step_seconds"] == pytest.approx(ours["step_seconds"] / 1e-3)
