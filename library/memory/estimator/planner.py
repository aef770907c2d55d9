"""Chooses among the memory options: the fastest combination that fits a device, reckoned from what tensors take.

Bytes are exact up to the allocator's gaps (library.memory.estimator.step_memory measures them on the meta device). Seconds are a rough
model, good for comparing options with one another: products at a fixed rate, copies at another, overlapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from library.memory.block_swap import spread_blocks, swap_limit
from library.memory.estimator.step_memory import BlockCost, BlockWork, PassCost

EVERY = 10**6  # more blocks than any model has
PRODUCT_RATE = 60e12  # operations a second that a good card reaches in bfloat16
COPY_RATE = 12e9  # bytes a second from pinned host memory
SLOTS = 2  # device buffers of block swap
OFFLOAD_BUFFERS = 2  # streams on their way between host and device
LEAN_WORK = 1.05  # norms, modulations and GELU again
SELECTIVE_WORK = 1.06  # what torch's selective policy costs beside the work that it does again
OFFLOAD_WORK = 1.03
SWAP_WORK = 1.03  # copies share the memory's bandwidth with the products that they hide behind
WIDENING_WORK: Mapping[str | None, float] = {None: 1.0, "fp8": 1.08, "int8": 1.08, "nf4": 1.25}


@dataclass(frozen=True)
class Levers:
    """One combination of options."""

    policy: str = "none"  # "none", "selective" or "full": how checkpointed blocks are
    checkpointed: int = 0  # blocks
    offload: bool = False
    swap: int = 0  # blocks
    quantisation: str | None = None
    lean: bool = False  # the blocks that are not checkpointed keep lean activations

    @property
    def uncheckpointed(self) -> str:
        """The policy of the blocks that are not checkpointed."""
        return "lean" if self.lean else "none"

    def options(self, depth: int) -> list[str]:
        """As on the command line."""
        found = []
        if self.policy != "none":
            found.append("--gradient_checkpointing")
            found += ["--selective_checkpointing"] * (self.policy == "selective")
            found += [f"--gradient_checkpointing_blocks {self.checkpointed}"] * (self.checkpointed < depth)
        found += ["--lean_activations"] * self.lean
        found += ["--cpu_offload_checkpointing"] * self.offload
        found += [f"--blocks_to_swap {self.swap}"] * (self.swap > 0)
        if self.quantisation == "fp8":
            found.append("--fp8_base_unet")
        elif self.quantisation:
            found.append(f"--base_quantization {self.quantisation}")
        return found


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
class Wanted:
    """What is given and what may be chosen."""

    policies: tuple[str, ...] = ("none", "selective", "full")
    checkpointed: int | None = None  # None: any number of blocks
    offload: tuple[bool, ...] = (False, True)
    lean: tuple[bool, ...] = (False, True)
    swap: int | None = None  # None: any number
    quantisations: tuple[str | None, ...] = (None, "fp8")  # in the order of preference: exact before rounded


@dataclass(frozen=True)
class StepReckoner:
    """Bytes and time of a training step under any levers."""

    models: Mapping[str | None, ModelBytes]  # by quantisation
    trained: TrainedBytes
    encoder_weights: int
    encoder_activations: int
    stream_bytes: int  # of both residual streams, which is what a checkpoint keeps
    work: tuple[BlockWork, ...]
    rounds_pinned: bool = False  # torch hands out pinned host memory for a GPU in powers of two

    @property
    def depth(self) -> int:
        return len(self.work)

    def base_bytes(self, levers: Levers) -> int:
        """Weights of the denoiser on the device."""
        model = self.models[levers.quantisation]
        if not levers.swap:
            return model.rest + sum(model.blocks)
        away = self.swapped(levers)
        return model.rest + sum(model.blocks) - sum(away) + min(SLOTS, levers.swap) * max(away)

    def swapped(self, levers: Levers) -> list[int]:
        """Bytes of each block that is swapped."""
        blocks = self.models[levers.quantisation].blocks
        return [blocks[index] for index in spread_blocks(self.depth, levers.swap)]

    def host_bytes(self, levers: Levers) -> int:
        """Pinned host memory."""
        kept = self.stream_bytes * levers.checkpointed if levers.offload else 0
        swapped = self.swapped(levers) if levers.swap else []
        return kept + sum(1 << (size - 1).bit_length() if self.rounds_pinned else size for size in swapped)

    def activation_bytes(self, levers: Levers) -> int:
        """The most that forward and backward take beside weights, block by block."""
        passes = self.models[levers.quantisation].passes
        costs = [
            self._cost(passes, levers, levers.policy if index < levers.checkpointed else levers.uncheckpointed, index)
            for index in range(self.depth)
        ]
        live = passes["none"].before + self.encoder_activations
        live += OFFLOAD_BUFFERS * self.stream_bytes if levers.offload else 0
        peak = live
        for cost in costs:
            peak = max(peak, live + cost.forward)
            live += cost.kept
        peak = max(peak, live + passes["none"].head)
        for cost, gradient in zip(reversed(costs), reversed(self.trained.gradients)):
            peak = max(peak, live + cost.carried + cost.backward)
            live += gradient - cost.kept
        return max(peak, sum(self.trained.gradients) + self.trained.other_gradients + self.trained.step)

    def _cost(self, passes: Mapping[str, PassCost], levers: Levers, policy: str, index: int) -> BlockCost:
        cost = passes[policy].blocks[index]
        away = self.stream_bytes if levers.offload and policy == levers.policy else 0
        return replace(cost, kept=max(0, cost.kept - away))

    def step_bytes(self, levers: Levers) -> StepBytes:
        activations = self.activation_bytes(levers)
        return StepBytes(self.base_bytes(levers), self.trained.kept, self.encoder_weights, activations)

    def seconds(self, levers: Levers) -> float:
        """Of one step, by the rough model: the frozen weights get no gradients, so backward's products are those of forward."""
        compute = sum(2 * work.products + 3.5 * work.attention for work in self.work[: levers.checkpointed])
        rest = sum(2 * work.products + 3.5 * work.attention for work in self.work[levers.checkpointed :])
        compute += rest * (LEAN_WORK if levers.lean else 1.0)
        for work in self.work[: levers.checkpointed]:
            if levers.policy == "full":
                compute += work.products + work.attention
            elif levers.policy == "selective":
                compute += SELECTIVE_WORK * work.products
        compute *= WIDENING_WORK[levers.quantisation] * (OFFLOAD_WORK if levers.offload else 1.0) / PRODUCT_RATE
        compute *= SWAP_WORK if levers.swap else 1.0
        copies = 2 * sum(self.swapped(levers)) / COPY_RATE if levers.swap else 0.0
        return max(compute, copies)


def combinations(reckoner: StepReckoner, wanted: Wanted, quantisation: str | None) -> Iterator[Levers]:
    """Every combination that may be chosen with one storage of the weights."""
    depth, limit = reckoner.depth, swap_limit(reckoner.depth)
    swaps = range(limit + 1) if wanted.swap is None else [min(wanted.swap, limit)]
    for policy in wanted.policies:
        counts: Sequence[int] = [0]
        if policy != "none":
            counts = range(1, depth + 1) if wanted.checkpointed is None else [min(wanted.checkpointed, depth)]
        for count in counts:
            for offload in wanted.offload:
                if offload and len(wanted.offload) > 1 and (policy != "full" or count < depth):
                    continue  # of a free choice: to offload some saves less than to recompute all
                for lean in wanted.lean if count < depth else wanted.lean[:1]:
                    for swap in swaps:
                        if not (offload and swap):
                            yield Levers(policy, count, offload, swap, quantisation, lean)


def choose(
    reckoner: StepReckoner, wanted: Wanted, device_bytes: int, host_bytes: int, beside: int = 0
) -> tuple[Levers, bool]:
    """The fastest combination that fits, and True; where none does, the one that takes the least, and False.

    Weights in fewer bits change the result a little: they are taken only where nothing exact fits. beside: what other
    moments of the run (previews, live image encoding) need beside the denoiser's weights.
    """
    least: tuple[int, Levers] | None = None
    for quantisation in wanted.quantisations:
        best: tuple[float, int, Levers] | None = None
        activations: dict[Levers, int] = {}
        for levers in combinations(reckoner, wanted, quantisation):
            bare = replace(levers, swap=0)
            if bare not in activations:
                activations[bare] = reckoner.step_bytes(bare).total - reckoner.base_bytes(bare)
            total = reckoner.base_bytes(levers) + max(activations[bare], beside)
            if least is None or total < least[0]:
                least = (total, levers)
            if total <= device_bytes and reckoner.host_bytes(levers) <= host_bytes:
                found = (reckoner.seconds(levers), reckoner.host_bytes(levers), levers)
                if best is None or found[:2] < best[:2]:
                    best = found
        if best is not None:
            return best[2], True
    assert least is not None
    return least[1], False
