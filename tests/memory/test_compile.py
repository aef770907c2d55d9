"""--torch_compile: one graph for each kind of block, for all image sizes or for each, with every memory saver; the same results."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from benchmarks.job import PRESETS, Job, Shape, conditioning_of, make_job, random_batch, training_options
from library.memory import apply
from library.training.precision import Precision

CPU = torch.device("cpu")
FULL = Precision(torch.float32, torch.float32, False)
SIDES = (64, 96, 128, 64, 160)
FIXED = (64, 96, 128)
SAVERS = {  # options, how many blocks of how many kinds: the first has nothing trained below it, the last leaves text as it was
    "none": ("", 2, 2),
    # behind a swapped block both streams are views, which counts as another kind
    "recomputed and swapped": ("--gradient_checkpointing --blocks_to_swap 2", 4, 3 + 1),
    "selective, float8 products": ("--gradient_checkpointing --selective_checkpointing --fp8_base --fp8_matmul", 2, 2),
    "nf4, LoRA with dropout": ("--base_quantization nf4 --network_dropout 0.3", 2, 2),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What --torch_compile compiles while the test runs, as numbers of operations: a backend that counts, and runs as it is."""
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    made: list[int] = []

    def counting(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable[..., object]:
        made.append(len(graph.graph.nodes))
        return graph.forward

    real = apply.compiled
    monkeypatch.setattr(apply, "compiled", lambda backend, dynamic: real(counting, dynamic))
    yield made
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def job_of(words: str, depth: int = 2, preset: str = "sd35m") -> Job:
    sizes = {"depth": depth, "hidden_size": 64, "mlp_hidden_size": 128, "context_size": 96}
    dual = (0,) if preset == "sd35m" else ()
    config = dataclasses.replace(PRESETS[preset], **sizes, dual_attention_blocks=dual)
    args = training_options(["--t5xxl_max_token_length", "8", "--seed", "3", *words.split()])
    job = make_job(config, args, Shape.of(args, 64), CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in job.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return job


def gradients(job: Job, side: int) -> Tensor:
    batch = random_batch(job.model.config, Shape(1, side, 64, 85), FULL, CPU)
    job.network.zero_grad()
    torch.manual_seed(side)
    job.model(batch.latents, torch.tensor([500.0]), *conditioning_of(batch)).square().mean().backward()
    return torch.cat([each.grad.flatten() for each in job.network.parameters() if each.grad is not None])


@pytest.mark.parametrize("savers", SAVERS)
def test_each_kind_of_block_is_compiled_once_for_all_sizes_and_gradients_stay(savers: str, graphs: list[int]):
    words, depth, kinds = SAVERS[savers]
    plain, job = job_of(words, depth), job_of(words + " --torch_compile", depth)
    for place, side in enumerate(SIDES):
        torch.testing.assert_close(gradients(job, side), gradients(plain, side), rtol=1e-4, atol=1e-6)
        assert len(graphs) == kinds, f"at size {place}"
    if savers == "none":  # previews have graphs of their own, once too
        for side in SIDES:
            batch = random_batch(job.model.config, Shape(1, side, 64, 85), FULL, CPU)
            with torch.no_grad():
                job.model(batch.latents, torch.tensor([500.0]), *conditioning_of(batch))
            assert len(graphs) == 2 * kinds


def test_where_inputs_go_to_host_memory_the_second_computation_has_graphs_of_its_own(graphs: list[int]):
    job = job_of("--gradient_checkpointing --cpu_offload_checkpointing --torch_compile")
    for side in SIDES:
        gradients(job, side)
    assert len(graphs) == 2 * 2


def test_fixed_shapes_compile_once_for_each_shape(graphs: list[int]):
    """More graphs than torch would keep by itself: beyond its limit it runs uncompiled, and says so in its log alone."""
    limit = torch._dynamo.config.recompile_limit = 4  # the fixture puts it back; torch's own, 8, would take more shapes
    job = job_of("--gradient_checkpointing")
    inner = apply.compiled("counted", False)
    job.model.run_block = apply.checkpointed(inner, apply.CheckpointSettings(), None)
    for _ in range(2):
        for side in FIXED:
            gradients(job, side)
    assert len(graphs) == 2 * len(FIXED) > limit


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="inductor needs a C++ compiler")
def test_what_inductor_makes_for_the_cpu_has_the_right_gradients(monkeypatch: pytest.MonkeyPatch):
    """With fixed shapes it has not, in PyTorch 2.13, where the modulation's LoRA is trained: one block of SD3 shows it."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # others would import torch first
    plain, job = job_of("", 1, "sd3m"), job_of("--torch_compile", 1, "sd3m")
    for side in (64, 96):
        torch.testing.assert_close(gradients(job, side), gradients(plain, side), rtol=1e-3, atol=1e-5)
