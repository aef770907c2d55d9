"""A training step makes the host wait for nothing: on a GPU by torch's own detector, on a CPU by counting what would wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.job import Job, Shape, make_job, sizes, training_options
from benchmarks.step import parser as step_parser
from library.monitoring.async_scalars import AsyncScalars
from library.monitoring.metrics import RunMetrics
from library.training.step import TrainingStep
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, train
from tests.reads import ReadCounter

STEPS = {
    "plain": "",
    "bf16": "--mixed_precision bf16 --full_bf16",
    "accumulation, batch": "--gradient_accumulation_steps 2 --train_batch_size 2",
    "swapped": "--blocks_to_swap 1 --gradient_checkpointing",
    "offloaded": "--gradient_checkpointing --cpu_offload_checkpointing",
    "selective": "--gradient_checkpointing --selective_checkpointing --gradient_checkpointing_blocks 2",
    "lean": "--lean_activations",
    "fp8": "--fp8_base_unet",
    "float8 products": "--fp8_base_unet --fp8_matmul",
    "int8": "--base_quantization int8",
    "nf4": "--base_quantization nf4",
    "dropouts": "--network_dropout 0.2 --network_args rank_dropout=0.2 module_dropout=0.2",
    "dora": "--network_args use_dora=True",
    "split qkv, LoRA+": "--network_args split_qkv=True loraplus_lr_ratio=4",
    "huber": "--loss_type huber --huber_schedule snr --weighting_scheme mode",
    "timesteps": "--timestep_sampling logit_normal --resolution_shift --loss_weighting velocity",
    "schedule": "--lr_scheduler cosine --lr_warmup_steps 10",
    "AdamW without weight decay": "--optimizer_args weight_decay=0",
}


def job_of(words: str, device: str = "cpu") -> Job:
    tiny = step_parser().parse_args(["--preset", "sd35m", "--depth", "3", "--hidden_size", "64"])
    args = training_options(["--t5xxl_max_token_length", "8", *words.split()])
    return make_job(sizes(tiny), args, Shape.of(args, 64), torch.device(device))


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_a_step_reads_nothing_from_the_device(words: str, monkeypatch: pytest.MonkeyPatch):
    job, counter = job_of(words), ReadCounter()
    job.step()  # what is done once is not part of it
    with counter.watching(monkeypatch):
        for _ in range(2):
            job.step()
    assert counter.reads == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_a_step_on_a_gpu_waits_for_nothing(words: str):
    if "fp8_matmul" in words and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    job = job_of(words, "cuda")
    for _ in range(2):
        job.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            job.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_counter_counts_what_would_wait(monkeypatch: pytest.MonkeyPatch):
    x = torch.arange(4.0)
    mask = x > 1
    waits = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.cpu(),
        lambda: mask.nonzero(),
        lambda: x[mask],
        lambda: bool(x.sum() > 3),
        lambda: float(x[0]),
        lambda: x.unique(),
        lambda: torch.equal(x, x),
        lambda: torch.tensor([1.0], device="cpu"),
    ]
    for wait in waits:
        counter = ReadCounter()
        with counter.watching(monkeypatch):
            wait()
        assert counter.reads
    counter = ReadCounter()
    with counter.watching(monkeypatch):
        torch.where(mask, x, 0).sum() + torch.tensor(1.0)
        with counter.pause():
            x.sum().item()
    assert counter.reads == []


RUNS = {
    "cached": (
        UNET,
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--scale_weight_norms",
        "1",
        "--ema_decay",
        "0.9",
    ),
    "live": (UNET, "--blocks_to_swap", "1", "--gradient_checkpointing", "--mixed_precision", "bf16"),
    "text encoders trained": ("--learning_rate", "1e-3"),
}


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_run_reads_its_numbers_late_and_nothing_else(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    """The real trainer, from a batch that is there to the numbers that are told. Telling them is the one read."""
    counter = ReadCounter()
    told: list[int] = []
    train_step, tell_step, tell_first = TrainingStep.__call__, RunMetrics.on_step_end, AsyncScalars._deliver_first

    def watched_step(self: TrainingStep[Any], progress: Any, batches: Any, samples: Any) -> Any:
        if progress.step == 0:  # encoders are loaded when they are first asked
            return train_step(self, progress, batches, samples)
        ready = list(batches)  # made by other processes, on the CPU
        with counter.watching(monkeypatch):
            return train_step(self, progress, iter(ready), samples)

    def watched_metrics(self: RunMetrics, report: Any) -> None:
        with counter.watching(monkeypatch):
            tell_step(self, report)

    def late(self: AsyncScalars) -> None:
        told.append(1)
        with counter.pause():
            tell_first(self)

    monkeypatch.setattr(TrainingStep, "__call__", watched_step)
    monkeypatch.setattr(RunMetrics, "on_step_end", watched_metrics)
    monkeypatch.setattr(AsyncScalars, "_deliver_first", late)
    train(workshop, tmp_path, *words, "--no_report", max_train_steps=3)
    assert counter.reads == [] and len(told) >= 3


def test_numbers_that_wait_hold_no_graph():
    late = AsyncScalars(torch.device("cpu"))
    seen: list[list[float]] = []
    value = torch.ones(1, requires_grad=True) * 2
    late.push(value, seen.append)
    assert isinstance(late._pending[0].values, Tensor) and not late._pending[0].values.requires_grad
    late.flush()
    assert seen == [[2.0]]
