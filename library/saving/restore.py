"""The start of a run: at step 0, where a state left off, or where --initial_step puts it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from library.common.errors import UserError
from library.saving.resume import resume_problems
from library.saving.state import SavedState, Stateful
from library.training.schedulers import Schedule
from library.training.train_progress import TrainProgress

logger = logging.getLogger(__name__)


def restore(state: SavedState, network: nn.Module, components: Mapping[str, Stateful]) -> TrainProgress:
    """Load the weights and every component from the state. UserError where one of its files is missing."""
    _load(state, "model.safetensors", lambda: network.load_state_dict(state.weights(), strict=True))
    for name, component in components.items():
        saved = state.component(name)
        if saved is None:
            raise UserError(f"--resume {state.folder}: {name}.pt is missing. Resume from another state.")
        _load(state, f"{name}.pt", partial(component.load_state_dict, saved))
    logger.info("Resumed at step %d (epoch %d)", state.position.step, state.position.epoch + 1)
    return state.position


def _load(state: SavedState, file: str, load: Callable[[], object]) -> None:
    """Load a part of the state. UserError where it is whole, but holds other things than this run's."""
    try:
        load()
    except UserError as error:
        raise UserError([f"--resume {state.folder}: {file}: {problem}" for problem in error.problems]) from error
    except Exception as error:  # each component fails in its own way on a state that is not its own
        raise UserError(
            f"--resume {state.folder}: {file} does not fit this run ({type(error).__name__}: {error})."
            " Resume from another state, or start a new run with --network_weights."
        ) from error


def override_start(start: TrainProgress, state: SavedState | None, schedule: Schedule) -> TrainProgress:
    """Begin at `start` (--initial_step, --initial_epoch). Without a state the fresh schedule is advanced to it."""
    if state is None:
        schedule.advance(start.step)
    else:
        logger.warning("The state is at step %d, but --initial_step or --initial_epoch wins.", state.position.step)
    logger.info("Starting at step %d (epoch %d)", start.step, start.epoch + 1)
    return start


@dataclass(frozen=True)
class StartSettings:
    """Where training begins. state: to resume from. start: of --initial_step or --initial_epoch, which win over the state."""

    state: SavedState | None
    start: TrainProgress | None
    max_steps: int | None  # None: the start is the user's, wherever the state is
    options: Mapping[str, object]  # those that a resumed run must have alike
    resume: str | None  # as --resume names it
    folder: str | None  # --output_dir


def starting_progress(
    settings: StartSettings, network: nn.Module, schedule: Schedule, components: Mapping[str, Stateful]
) -> TrainProgress:
    """Load the state, if there is one, into the network and the components; return where training begins."""
    state, progress = settings.state, TrainProgress()
    if state is not None:
        problems = resume_problems(
            state, settings.options, settings.max_steps
        )  # again: memory options may be chosen since
        if problems:
            raise UserError(problems)
        progress = restore(state, network, components)
    elif settings.resume:
        logger.info("--resume auto: there is no state in %s yet; starting anew.", settings.folder)
    return progress if settings.start is None else override_start(settings.start, state, schedule)
