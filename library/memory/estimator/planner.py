"""Chooses among the memory options: the fastest combination that fits a device, computed from what tensors take.

Bytes are exact up to the allocator's gaps (library.memory.estimator.step_memory measures them on the meta device). Seconds are a rough
model, good for comparing options with one another: matmuls at a fixed rate, copies at another, overlapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from library.common.transformer import BlockFlops
from library.memory.block_swap import evenly_spaced, swap_limit
from library.memory.estimator.step_memory import BlockCost, PassCost

ALL_BLOCKS = 10**6  # more blocks than any model has
MATMUL_RATE = 60e12  # operations a second that a good card reaches in bfloat16
COPY_RATE = 12e9  # bytes a second from pinned host memory
SLOTS = 2  # device buffers of block swap
OFFLOAD_BUFFERS = 2  # streams on their way between host and device
POINTWISE_WORK = 1.05  # norms, modulations and GELU again
SELECTIVE_WORK = 1.06  # what torch's selective policy costs beside the work that it does again
OFFLOAD_WORK = 1.03
SWAP_WORK = 1.03  # copies share the memory's bandwidth with the matmuls that they hide behind
DEQUANTIZE_WORK: Mapping[str | None, float] = {None: 1.0, "fp8": 1.08, "int8": 1.08, "nf4": 1.25}


@dataclass(frozen=True)
class MemoryOptions:
    """One combination of options."""

    policy: str = "none"  # "none", "selective" or "full": how checkpointed blocks are
    checkpointed: int = 0  # blocks
    offload: bool = False
    swap: int = 0  # blocks
    quantization: str | None = None
    recompute_pointwise: bool = False  # the blocks that are not checkpointed compute their pointwise steps again

    @property
    def uncheckpointed(self) -> str:
        """The policy of the blocks that are not checkpointed."""
        return "pointwise" if self.recompute_pointwise else "none"

    def flags(self, depth: int) -> list[str]:
        """As on the command line."""
        flags = []
        if self.policy != "none":
            flags.append("--gradient_checkpointing")
            flags += ["--selective_checkpointing"] * (self.policy == "selective")
            flags += [f"--gradient_checkpointing_blocks {self.checkpointed}"] * (self.checkpointed < depth)
        flags += ["--lean_activations"] * self.recompute_pointwise
        flags += ["--cpu_offload_checkpointing"] * self.offload
        flags += [f"--blocks_to_swap {self.swap}"] * (self.swap > 0)
        if self.quantization == "fp8":
            flags.append("--fp8_base_unet")
        elif self.quantization:
            flags.append(f"--base_quantization {self.quantization}")
        return flags


@dataclass(frozen=True)
class ModelBytes:
    """The denoiser with one storage of its weights."""

    blocks: tuple[int, ...]  # weights of each block
    rest: int  # all other weights
    passes: Mapping[str, PassCost]  # by policy


@dataclass(frozen=True)
class TrainedBytes:
    """What is trained, and what serves it."""

    weights: int
    gradients: tuple[int, ...]  # of each block's LoRA
    other_gradients: int
    optimizer: int
    averages: int  # EMA, and the buffer in which processes reduce gradients
    step: int  # that the optimizer needs for a moment

    @property
    def kept(self) -> int:
        return self.weights + self.optimizer + self.averages


@dataclass(frozen=True)
class StepBytes:
    """The peak of a training step and what it is made of."""

    base: int
    trained: int
    encoders: int  # text encoders and the VAE, where they work live
    activations: int  # and gradients

    @property
    def total(self) -> int:
        return self.base + self.trained + self.encoders + self.activations


@dataclass(frozen=True)
class SearchSpace:
    """The combinations that may be chosen."""

    policies: tuple[str, ...] = ("none", "selective", "full")
    checkpointed: int | None = None  # None: any number of blocks
    offload: tuple[bool, ...] = (False, True)
    recompute_pointwise: tuple[bool, ...] = (False, True)
    swap: int | None = None  # None: any number
    quantizations: tuple[str | None, ...] = (None, "fp8")  # in the order of preference: exact before rounded


@dataclass(frozen=True)
class StepMemoryEstimator:
    """Bytes and time of a training step under any options."""

    models: Mapping[str | None, ModelBytes]  # by quantization
    trained: TrainedBytes
    encoder_weights: int
    encoder_activations: int
    stream_bytes: int  # of both residual streams, which is what a checkpoint keeps
    work: tuple[BlockFlops, ...]
    rounds_pinned: bool = False  # torch hands out pinned host memory for a GPU in powers of two

    @property
    def depth(self) -> int:
        return len(self.work)

    def base_bytes(self, options: MemoryOptions) -> int:
        """Weights of the denoiser on the device."""
        model = self.models[options.quantization]
        if not options.swap:
            return model.rest + sum(model.blocks)
        away = self.swapped(options)
        return model.rest + sum(model.blocks) - sum(away) + min(SLOTS, options.swap) * max(away)

    def swapped(self, options: MemoryOptions) -> list[int]:
        """Bytes of each block that is swapped."""
        blocks = self.models[options.quantization].blocks
        return [blocks[index] for index in evenly_spaced(self.depth, options.swap)]

    def host_bytes(self, options: MemoryOptions) -> int:
        """Pinned host memory."""
        kept = self.stream_bytes * options.checkpointed if options.offload else 0
        swapped = self.swapped(options) if options.swap else []
        return kept + sum(1 << (size - 1).bit_length() if self.rounds_pinned else size for size in swapped)

    def activation_bytes(self, options: MemoryOptions) -> int:
        """The most that forward and backward take beside weights, block by block."""
        passes = self.models[options.quantization].passes
        costs = [
            self._cost(
                passes, options, options.policy if index < options.checkpointed else options.uncheckpointed, index
            )
            for index in range(self.depth)
        ]
        live = passes["none"].before + self.encoder_activations
        live += OFFLOAD_BUFFERS * self.stream_bytes if options.offload else 0
        peak = live
        for cost in costs:
            peak = max(peak, live + cost.forward)
            live += cost.kept
        peak = max(peak, live + passes["none"].head)
        for cost, gradient in zip(reversed(costs), reversed(self.trained.gradients)):
            peak = max(peak, live + cost.carried + cost.backward)
            live += gradient - cost.kept
        return max(peak, sum(self.trained.gradients) + self.trained.other_gradients + self.trained.step)

    def _cost(self, passes: Mapping[str, PassCost], options: MemoryOptions, policy: str, index: int) -> BlockCost:
        cost = passes[policy].blocks[index]
        away = self.stream_bytes if options.offload and policy == options.policy else 0
        return replace(cost, kept=max(0, cost.kept - away))

    def step_bytes(self, options: MemoryOptions) -> StepBytes:
        activations = self.activation_bytes(options)
        return StepBytes(self.base_bytes(options), self.trained.kept, self.encoder_weights, activations)

    def seconds(self, options: MemoryOptions) -> float:
        """Of one step, by the rough model: the frozen weights get no gradients, so backward's matmuls are those of forward."""
        compute = sum(2 * work.matmul + 3.5 * work.attention for work in self.work[: options.checkpointed])
        rest = sum(2 * work.matmul + 3.5 * work.attention for work in self.work[options.checkpointed :])
        compute += rest * (POINTWISE_WORK if options.recompute_pointwise else 1.0)
        for work in self.work[: options.checkpointed]:
            if options.policy == "full":
                compute += work.matmul + work.attention
            elif options.policy == "selective":
                compute += SELECTIVE_WORK * work.matmul
        compute *= DEQUANTIZE_WORK[options.quantization] * (OFFLOAD_WORK if options.offload else 1.0) / MATMUL_RATE
        compute *= SWAP_WORK if options.swap else 1.0
        copies = 2 * sum(self.swapped(options)) / COPY_RATE if options.swap else 0.0
        return max(compute, copies)


def combinations(
    estimator: StepMemoryEstimator, space: SearchSpace, quantization: str | None
) -> Iterator[MemoryOptions]:
    """Every combination that may be chosen with one storage of the weights."""
    depth, limit = estimator.depth, swap_limit(estimator.depth)
    swaps = range(limit + 1) if space.swap is None else [min(space.swap, limit)]
    for policy in space.policies:
        counts: Sequence[int] = [0]
        if policy != "none":
            counts = range(1, depth + 1) if space.checkpointed is None else [min(space.checkpointed, depth)]
        for count in counts:
            for offload in space.offload:
                if offload and len(space.offload) > 1 and (policy != "full" or count < depth):
                    continue  # of a free choice: to offload some saves less than to recompute all
                for pointwise in space.recompute_pointwise if count < depth else space.recompute_pointwise[:1]:
                    for swap in swaps:
                        if not (offload and swap):
                            yield MemoryOptions(policy, count, offload, swap, quantization, pointwise)


def choose(
    estimator: StepMemoryEstimator, space: SearchSpace, device_bytes: int, host_bytes: int, beside: int = 0
) -> tuple[MemoryOptions, bool]:
    """The fastest combination that fits, and True; where none does, the one that takes the least, and False.

    Weights in fewer bits change the result a little: they are taken only where nothing exact fits. beside: what other
    moments of the run (previews, live image encoding) need beside the denoiser's weights.
    """
    least: tuple[int, MemoryOptions] | None = None
    for quantization in space.quantizations:
        best: tuple[float, int, MemoryOptions] | None = None
        activations: dict[MemoryOptions, int] = {}
        for options in combinations(estimator, space, quantization):
            bare = replace(options, swap=0)
            if bare not in activations:
                activations[bare] = estimator.step_bytes(bare).total - estimator.base_bytes(bare)
            total = estimator.base_bytes(options) + max(activations[bare], beside)
            if least is None or total < least[0]:
                least = (total, options)
            if total <= device_bytes and estimator.host_bytes(options) <= host_bytes:
                score = (estimator.seconds(options), estimator.host_bytes(options), options)
                if best is None or score[:2] < best[:2]:
                    best = score
        if best is not None:
            return best[2], True
    assert least is not None
    return least[1], False
