"""`--memory_plan auto` and `--blocks_to_swap auto`: what the run would take, from headers, and which options make it fit.

No weights are read: models, network and optimizer are measured on the meta device (library.memory.estimator.step_memory).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from library.common.errors import UserError
from library.memory.checkpointing import CheckpointSettings
from library.memory.estimator.planner import ALL_BLOCKS, SearchSpace, choose
from library.memory.estimator.table import MemoryPlan, Phase, size_text
from library.preflight.inspector import Files, ModelInspector
from library.preflight.memory_profile import MemoryProfile, ProfileSettings
from library.preflight.network import quiet
from library.preflight.plan import RunPlan
from library.training.precision import Precision

GIB = 2**30
OWN_SHARE = 0.5 * GIB  # of a card's memory: the driver's context and the libraries' work space
GAPS = 0.05  # of what is free: the allocator's rounding and holes


@dataclass(frozen=True)
class PlannerSettings:
    """The memory options as the command line has them; the planner chooses those that it leaves open."""

    profile: ProfileSettings
    plans_all: bool = False  # --memory_plan auto
    plans_swap: bool = False  # --blocks_to_swap auto
    blocks_to_swap: int | None = None
    checkpointing: CheckpointSettings | None = None
    lean_activations: bool = False
    compiles: bool = False
    quantization: str | None = None  # "fp8", "int8" or "nf4"
    vram: float | None = None  # GiB, instead of what the device has free

    @property
    def is_active(self) -> bool:
        """Whether there is something to choose."""
        return self.plans_all or self.plans_swap


@dataclass(frozen=True)
class MemoryBudget:
    """What may be used, in bytes."""

    device: int
    host: int
    source: str  # where the numbers come from


def memory_budget(vram: float | None, device: torch.device, processes_here: int) -> MemoryBudget:
    """The memory of this process: that of `--vram` in GiB, or what the device has free; and its share of the host's."""
    import psutil

    host = psutil.virtual_memory().available // processes_here
    if vram is not None:
        usable = int((vram * GIB - OWN_SHARE) * (1 - GAPS))
        return MemoryBudget(usable, host, f"--vram {vram:g} GiB")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MemoryBudget(int(free * (1 - GAPS)), host, f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free")
    return MemoryBudget(int(host * (1 - GAPS)), host, f"{host / GIB:.1f} GiB of host memory are free")


def smallest_budget(budgets: list[MemoryBudget]) -> MemoryBudget:
    """What every process has at least, so that all choose the same; `source` is the first one's."""
    return replace(budgets[0], device=min(each.device for each in budgets), host=min(each.host for each in budgets))


def plan_memory(
    settings: PlannerSettings,
    plan: RunPlan[Files],
    inspector: ModelInspector[Files],
    device: torch.device,
    precision: Precision,
    processes: int,
    budget: MemoryBudget,
) -> MemoryPlan:
    """Measure the run and choose. UserError where nothing fits the budget."""
    space = search_space(settings)
    with quiet(logging.INFO):
        profile = MemoryProfile(
            settings.profile, plan, inspector, device.type, precision, processes, space.quantizations[0]
        )
        chosen = _choose(profile, replace(space, quantizations=space.quantizations[:1]), budget)
        for quantization in space.quantizations[1:]:
            if not chosen.fits and profile.measure_quantized(quantization or ""):
                chosen = _choose(profile, replace(space, quantizations=(quantization,)), budget)
    if not chosen.fits:
        raise UserError(
            f"No choice of memory options fits: the least is {size_text(chosen.peak)}, and {size_text(budget.device)} can be used "
            f"({budget.source}). Lower the resolution, train_batch_size or --network_dim, or cache text and latents.\n{chosen.text()}"
        )
    return chosen


def _choose(profile: MemoryProfile[Files], space: SearchSpace, budget: MemoryBudget) -> MemoryPlan:
    """The best choice with T5 on the device, and with T5 on the CPU where only that fits."""
    for t5_on_cpu in (False, True) if profile.an_encoder_may_move else (False,):
        captions = profile.caption_bytes(t5_on_cpu)
        estimator = profile.estimator(t5_on_cpu)
        options, fits = choose(estimator, space, budget.device, budget.host, profile.other_phases_peak(estimator))
        fits = fits and captions <= budget.device and profile.image_bytes <= budget.device
        if fits:
            break
    phases = [
        Phase("captions encoded, one encoder at a time", captions),
        Phase("images encoded", profile.image_bytes),
        *profile.live_phases(estimator, estimator.base_bytes(options)),
    ]
    return MemoryPlan(options, t5_on_cpu, fits, estimator, phases, budget.device, budget.source, str(profile.shape))


def search_space(settings: PlannerSettings) -> SearchSpace:
    """What the options leave open: with --memory_plan all that is unset, else the number of swapped blocks alone."""
    checkpointing, free = settings.checkpointing, settings.plans_all
    open_swap = settings.plans_swap or (free and settings.blocks_to_swap is None)
    choices = (False, True) if free and not settings.compiles else (False,)
    space = SearchSpace(
        swap=None if open_swap else settings.blocks_to_swap or 0,
        recompute_pointwise=(True,) if settings.lean_activations else choices,
    )
    if checkpointing is not None:
        policy, blocks = "selective" if checkpointing.selective else "full", checkpointing.blocks or ALL_BLOCKS
        space = replace(space, policies=(policy,), checkpointed=blocks, offload=(checkpointing.offload,))
    elif not free:
        space = replace(space, policies=("none",), offload=(False,))
    if settings.quantization is not None or not free:
        space = replace(space, quantizations=(settings.quantization,))
    return space
