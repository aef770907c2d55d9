"""Preflight in its order: the state to resume from, the plan, the memory options. Open this package here.

Headers alone are read. Every mistake of the user that can be found without weights is found here, and all are reported at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from library.common.errors import collect_errors
from library.distributed.consensus import gather
from library.distributed.launch import check_resume_consistency
from library.memory.estimator.table import MemoryPlan
from library.preflight.inspector import Files, ModelInspector
from library.preflight.memory import PlannerSettings, memory_budget, plan_memory, smallest_budget
from library.preflight.plan import PlanSettings, RunPlan, plan_run
from library.saving.hub import HubSettings, HubUploader
from library.saving.resume import ResumeSettings, state_to_resume
from library.saving.run_lock import RunLock
from library.saving.state import SavedState
from library.training.precision import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareSettings:
    plan: PlanSettings
    planner: PlannerSettings
    resume: ResumeSettings
    uploads: HubSettings | None = None  # None: nothing is uploaded, or the run is only shown


@dataclass(frozen=True)
class Prepared(Generic[Files]):
    plan: RunPlan[Files]
    memory: MemoryPlan | None  # None: no memory option is left to the planner
    state: SavedState | None
    hub: HubUploader | None

    def text(self, accumulation: int) -> str:
        """The plan, and the memory options where they were planned, for people."""
        plan = self.plan.text(accumulation)
        return plan if self.memory is None else f"{plan}\n\n{self.memory.text()}"


def prepare_run(
    settings: PrepareSettings,
    inspector: ModelInspector[Files],
    accelerator: Accelerator,
    precision: Precision,
    lock: RunLock | None = None,
    known_problems: Sequence[str] = (),
) -> Prepared[Files]:
    """Work out the run. UserError lists `known_problems` with all that is found here. lock: of the outputs, which is taken here; None: none is."""
    problems = [*known_problems, *gather(accelerator, _take_lock(settings.resume, lock, accelerator))]
    hub = collect_errors(problems, lambda: _reach_hub(settings.uploads, accelerator))
    with accelerator.local_main_process_first():  # one process of each machine downloads
        state = collect_errors(problems, lambda: state_to_resume(settings.resume))
    steps = gather(accelerator, [None if state is None else state.position])
    problems += check_resume_consistency(steps, settings.resume.resume)
    processes = accelerator.num_processes
    plan = plan_run(settings.plan, inspector, problems, processes, lambda seed: gather(accelerator, [seed])[0], state)
    memory = None
    if settings.planner.is_active:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = memory_budget(settings.planner.vram, accelerator.device, local_processes)
        budget = smallest_budget(gather(accelerator, [free]))  # all processes are to choose the same
        memory = plan_memory(settings.planner, plan, inspector, accelerator.device, precision, processes, budget)
    return Prepared(plan, memory, state, hub)


def _take_lock(settings: ResumeSettings, lock: RunLock | None, accelerator: Accelerator) -> list[str]:
    """Take the lock of the output folder on rank 0, which writes there. The problem where another run holds it."""
    if lock is None or settings.leaves_no_trace or not settings.output_dir or not accelerator.is_main_process:
        return []
    return lock.acquire(Path(settings.output_dir), settings.output_name or "last")


def _reach_hub(settings: HubSettings | None, accelerator: Accelerator) -> HubUploader | None:
    """Connect to the repository now, so that a wrong name or token is reported before training."""
    return HubUploader(settings) if settings is not None and accelerator.is_main_process else None
