"""The start of a run: at step 0, where a state left off, or where --initial_step puts it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from library.common.errors import UserError
from library.saving.state import SavedState, Stateful
from library.training.schedulers import Schedule
from library.training.train_progress import TrainProgress

logger = logging.getLogger(__name__)


def restore(state: SavedState, network: nn.Module, components: Mapping[str, Stateful]) -> TrainProgress:
    """Load the weights and every component from the state. UserError where one of its files is missing."""
    network.load_state_dict(state.weights(), strict=True)
    for name, component in components.items():
        saved = state.component(name)
        if saved is None:
            raise UserError(f"--resume {state.folder}: {name}.pt is missing. Resume from another state.")
        component.load_state_dict(saved)
    logger.info("Resumed at step %d (epoch %d)", state.position.step, state.position.epoch + 1)
    return state.position


def override_start(start: TrainProgress, state: SavedState | None, schedule: Schedule) -> TrainProgress:
    """Begin at `start` (--initial_step, --initial_epoch). Without a state the fresh schedule is advanced to it."""
    if state is None:
        schedule.advance(start.step)
    else:
        logger.warning("The state is at step %d, but --initial_step or --initial_epoch wins.", state.position.step)
    logger.info("Starting at step %d (epoch %d)", start.step, start.epoch + 1)
    return start
