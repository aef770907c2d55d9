"""`--memory_plan auto` and `--blocks_to_swap auto`: what the run would take, from headers, and which options make it fit.

No weights are read: models, network and optimizer are measured on the meta device (library.memory.estimator.step_memory).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from library.common.errors import UserError
from library.memory.estimator.planner import EVERY, Wanted, choose
from library.memory.estimator.table import MemoryPlan, Phase, size_text
from library.preflight.memory_profile import MeasuredRun
from library.preflight.plan import RunPlan
from library.preflight.settings import checkpoint_settings
from library.training.precision import Precision

GIB = 2**30
OWN_SHARE = 0.5 * GIB  # of a card's memory: the driver's context and the libraries' work space
GAPS = 0.05  # of what is free: the allocator's rounding and holes


@dataclass(frozen=True)
class Room:
    """What may be used, in bytes."""

    device: int
    host: int
    told: str  # where the numbers come from


def wants_plan(args: argparse.Namespace) -> bool:
    return args.memory_plan == "auto" or args.blocks_to_swap == "auto"


def room(args: argparse.Namespace, device: torch.device, processes_here: int) -> Room:
    """The memory of this process: that of `--vram`, or what the device has free; and its share of the host's."""
    import psutil

    host = psutil.virtual_memory().available // processes_here
    if args.vram is not None:
        usable = int((args.vram * GIB - OWN_SHARE) * (1 - GAPS))
        return Room(usable, host, f"--vram {args.vram:g} GiB")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(int(free * (1 - GAPS)), host, f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free")
    return Room(int(host * (1 - GAPS)), host, f"{host / GIB:.1f} GiB of host memory are free")


def plan_memory(
    args: argparse.Namespace, plan: RunPlan, device: torch.device, precision: Precision, processes: int, given: Room
) -> MemoryPlan:
    """Measure the run and choose. UserError where nothing fits `given`."""
    wanted = wanted_levers(args)
    with _quiet():
        measured = MeasuredRun(args, plan, device.type, precision, processes, wanted.quantisations[0])
        chosen = _choose(measured, replace(wanted, quantisations=wanted.quantisations[:1]), given)
        for quantisation in wanted.quantisations[1:]:
            if not chosen.fits and measured.measure_quantised(quantisation or ""):
                chosen = _choose(measured, replace(wanted, quantisations=(quantisation,)), given)
    if not chosen.fits:
        raise UserError(
            f"No choice of memory options fits: the least is {size_text(chosen.peak)}, and {size_text(given.device)} can be used "
            f"({given.told}). Lower the resolution, train_batch_size or --network_dim, or cache text and latents.\n{chosen.text()}"
        )
    return chosen


def _choose(measured: MeasuredRun, wanted: Wanted, given: Room) -> MemoryPlan:
    """The best choice with T5 where it is, and with T5 on the CPU where only that fits."""
    for t5_on_cpu in (False, True) if measured.t5_may_move else (False,):
        captions = measured.caption_bytes(t5_on_cpu)
        reckoner = measured.reckoner(t5_on_cpu)
        levers, fits = choose(reckoner, wanted, given.device, given.host, measured.beside(reckoner))
        fits = fits and captions <= given.device and measured.image_bytes <= given.device
        if fits:
            break
    phases = [
        Phase("captions encoded, one encoder at a time", captions),
        Phase("images encoded", measured.image_bytes),
        *measured.live_phases(reckoner, reckoner.base_bytes(levers)),
    ]
    return MemoryPlan(levers, t5_on_cpu, fits, reckoner, phases, given.device, given.told, str(measured.shape))


def wanted_levers(args: argparse.Namespace) -> Wanted:
    """What the options leave open: with --memory_plan all that is not given, else the number of swapped blocks alone."""
    settings = checkpoint_settings(args)
    quantisation = "fp8" if args.fp8_base else args.base_quantization
    free = args.memory_plan == "auto"
    swap = None if args.blocks_to_swap == "auto" or (free and args.blocks_to_swap is None) else args.blocks_to_swap or 0
    lean = (True,) if args.lean_activations else (False, True) if free and not args.torch_compile else (False,)
    wanted = Wanted(swap=swap, lean=lean)
    if settings is not None:
        policy = "selective" if settings.selective else "full"
        wanted = replace(wanted, policies=(policy,), checkpointed=settings.blocks or EVERY, offload=(settings.offload,))
    elif not free:
        wanted = replace(wanted, policies=("none",), offload=(False,))
    if quantisation is not None or not free:
        wanted = replace(wanted, quantisations=(quantisation,))
    return wanted


def apply_plan(args: argparse.Namespace, chosen: MemoryPlan) -> None:
    """Write the choice into the options, as if it had been given."""
    levers = chosen.levers
    args.blocks_to_swap = levers.swap or None
    args.gradient_checkpointing = levers.policy != "none"
    args.gradient_checkpointing_blocks = levers.checkpointed if 0 < levers.checkpointed < chosen.depth else None
    args.selective_checkpointing = levers.policy == "selective"
    args.cpu_offload_checkpointing = levers.offload
    args.lean_activations = levers.lean
    if levers.quantisation == "fp8" and not args.fp8_base:
        args.fp8_base = args.fp8_base_unet = True
    if chosen.t5_on_cpu:
        args.t5xxl_device = "cpu"


@contextmanager
def _quiet() -> Iterator[None]:
    """Making a network is logged when it is made for good, not when it is measured."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
