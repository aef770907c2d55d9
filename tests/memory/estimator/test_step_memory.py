"""What a step takes, reckoned on the meta device, against what torch's allocator hands out in a real step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from library.common.transformer import StepShape
from library.memory.apply import MemorySettings, apply_memory_optimizations
from library.memory.checkpointing import CheckpointSettings
from library.memory.estimator.planner import MemoryOptions, ModelBytes, StepMemoryEstimator, TrainedBytes
from library.memory.estimator.step_memory import (
    POLICIES,
    TrainingStep,
    measure_call,
    measure_pass,
    weight_bytes,
)
from library.memory.estimator.tracker import FusedAttention, StorageTracker
from library.memory.quantization import META_KINDS, replace_linears
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.step_inputs import block_flops, block_of, meta_inputs, stream_tokens
from library.sd3.vae import Vae, VaeConfig
from networks.lora_sd3 import create_network

CONFIG = MMDiTConfig(5, 128, 2, 16, 16, 192, 256, 512, 64, True, (0, 1))
SHAPE = StepShape(batch=2, height=256, width=192, context_tokens=100)
DEPTH, CPU = CONFIG.depth, torch.device("cpu")


def network_of(model: MMDiT, **arguments: str) -> nn.Module:
    network = create_network(1.0, 8, 8, None, [None] * 3, model, None, **arguments)
    network.to(model.x_embedder.proj.weight.device).train().attach()
    return network


def estimator(options: MemoryOptions, dtype: torch.dtype = torch.float32, **arguments: str) -> StepMemoryEstimator:
    with torch.device("meta"):
        model = MMDiT(CONFIG).to(dtype).requires_grad_(False)
    if options.quantization:
        for block in model.blocks:
            replace_linears(block, META_KINDS[options.quantization])
    network = network_of(model, **arguments)
    blocks = tuple(weight_bytes(block) for block in model.blocks)
    needed = {"none", options.policy, options.uncheckpointed}
    step = TrainingStep(model, network, lambda: meta_inputs(CONFIG, dtype, SHAPE), block_of)
    passes = {policy: measure_pass(step, policy, "cpu") for policy in POLICIES if policy in needed}
    gradients = step.trained_bytes()
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = TrainedBytes(weight_bytes(network), tuple(gradients), size - sum(gradients), 2 * size, 0, 0)
    models = {options.quantization: ModelBytes(blocks, weight_bytes(model) - sum(blocks), passes)}
    streams = stream_tokens(SHAPE) * CONFIG.hidden_size * dtype.itemsize
    return StepMemoryEstimator(models, trained, 0, 0, streams, tuple(block_flops(model, SHAPE)))


def real_model(options: MemoryOptions, device: torch.device, dtype: torch.dtype = torch.float32, **arguments: str):
    """A real model under the options, and a function that takes a training step with it."""
    model = MMDiT(CONFIG).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    settings = {
        "none": None,
        "selective": CheckpointSettings(options.checkpointed, selective=True),
        "full": CheckpointSettings(options.checkpointed, offload=options.offload),
    }[options.policy]
    swapper = apply_memory_optimizations(
        model,
        MemorySettings(
            options.swap,
            settings,
            quantization=options.quantization,
            recompute_pointwise=options.recompute_pointwise,
        ),
        device,
    )
    network = network_of(model, **arguments)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        size = (SHAPE.batch, 16, SHAPE.height // 8, SHAPE.width // 8)
        given = (
            torch.randn(size, device=device),
            torch.rand(SHAPE.batch, device=device) * 1000,
            torch.randn(SHAPE.batch, SHAPE.context_tokens, CONFIG.context_size, dtype=dtype, device=device),
            torch.randn(SHAPE.batch, CONFIG.pooled_size, dtype=dtype, device=device),
        )
        velocity = model(*given)
        loss = velocity.float().pow(2).mean()
        del velocity
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, swapper, step


def allocated_peak(work: Callable[[], None]) -> int:
    """The most bytes that were allocated at once, above those before, from the allocator's own records."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (MemoryOptions(), {}),
        (MemoryOptions(recompute_pointwise=True), {}),
        (MemoryOptions("full", 3, recompute_pointwise=True, swap=2), {"split_qkv": "True"}),
        (MemoryOptions("selective", DEPTH), {}),
        (MemoryOptions("full", DEPTH, offload=True), {}),
        (MemoryOptions("full", DEPTH, quantization="nf4"), {}),
        (MemoryOptions("full", 4, quantization="fp8"), {"train_block_indices": "2-4"}),
        (MemoryOptions(), {"use_dora": "True"}),
    ],
    ids=str,
)
def test_the_reckoned_peak_is_the_allocators(options: MemoryOptions, arguments: dict[str, str]):
    _, _, step = real_model(options, CPU, **arguments)
    step()  # the optimizer's state and the offloader's buffers are there from now on
    measured = allocated_peak(step)
    assert estimator(options, **arguments).activation_bytes(options) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("options", [MemoryOptions(swap=1), MemoryOptions(swap=3, quantization="int8")])
def test_base_and_host_bytes_are_those_of_the_arranged_model(options: MemoryOptions):
    model, swapper, _ = real_model(options, CPU)
    whole = weight_bytes(model)
    away = swapper.host_bytes if swapper else 0
    on_device = whole - away + (swapper.device_bytes if swapper else 0)
    reckoned = estimator(options)
    assert reckoned.base_bytes(options) == pytest.approx(on_device, rel=0.02)  # packing aligns each tensor
    assert reckoned.host_bytes(options) == pytest.approx(away, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options", [MemoryOptions(), MemoryOptions("full", DEPTH), MemoryOptions("full", DEPTH, swap=4)], ids=str
)
def test_the_reckoned_peak_is_that_of_the_gpu(options: MemoryOptions):
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    *kept, step = real_model(options, device, torch.bfloat16)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - before
    del kept
    reckoned = estimator(options, torch.bfloat16)
    assert reckoned.step_bytes(options).total == pytest.approx(measured, rel=0.1)


def test_attention_without_a_device_keeps_no_matrix_of_all_pairs():
    q = torch.empty(1, 4, 4096, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    for device in ("cpu", "cuda"):
        tracker = StorageTracker()
        tracker.watch([q])
        with FusedAttention(device), tracker:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert tracker.peak < 4 * q.numel() * q.element_size()


def test_the_tracker_counts_what_lives_and_each_storage_once():
    tracker = StorageTracker()
    with tracker:
        a = torch.zeros(1024)
        b = a.view(32, 32).t()
        assert tracker.live == 4096
        c = a + 1
        assert tracker.live == tracker.peak == 8192
        del c
        assert tracker.live == 4096
        del a
        assert tracker.live == 4096  # b is its view
        del b
    assert (tracker.live, tracker.peak) == (0, 8192)


@pytest.mark.parametrize(("method", "shape"), [("encode", (2, 3, 96, 64)), ("decode", (1, 16, 12, 8))])
def test_the_vae_without_content_takes_what_a_real_one_does(method: str, shape: tuple[int, ...]):
    vae = Vae(VaeConfig(16, (1, 2, 2), 1, 16)).requires_grad_(False).eval()
    tracker = StorageTracker()
    tracker.watch(vae.parameters())
    start = tracker.live
    with torch.no_grad(), tracker:
        getattr(vae, method)(torch.zeros(shape))
    empty = vae.to("meta")
    estimated = measure_call(empty, lambda: getattr(empty, method)(torch.empty(shape, device="meta")), "cpu")
    assert estimated == pytest.approx(tracker.peak - start, rel=0.01)


def test_work_is_what_torchs_own_counter_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = MMDiT(CONFIG).requires_grad_(False)
    size = (SHAPE.batch, 16, SHAPE.height // 8, SHAPE.width // 8)
    given = (torch.randn(size), torch.rand(SHAPE.batch), torch.randn(SHAPE.batch, 100, 192), torch.randn(2, 256))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's kernel
        model(*given)
    counted = counter.get_flop_counts()
    blocks = sum(sum(counted[f"MMDiT.joint_blocks.{index}"].values()) for index in range(DEPTH))
    assert sum(work.matmul + work.attention for work in block_flops(model, SHAPE)) == blocks
