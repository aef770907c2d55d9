"""The state that a run goes on from: which one it is, and whether the run fits it."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from library.preflight.settings import given_start
from library.saving.determining_options import options_that_shape
from library.saving.hub import fetch_state
from library.saving.state import POSITION_FILE, SavedState, changed_options, newest_state, open_state

if TYPE_CHECKING:
    from library.preflight.plan import RunPlan

ALWAYS_THERE = ("optimizer.pt", "scheduler.pt", "averages.pt")


def state_to_resume(args: argparse.Namespace) -> SavedState | None:
    """What --resume means: a folder, with `auto` the newest whole state of this output name if there is one, or a state on the Hub.

    Of one on the Hub the position alone is downloaded; `whole_state` fetches the rest. UserError where there is none.
    """
    if not args.resume:
        return None
    if args.resume_from_huggingface:
        return open_state(_from_hub(args, POSITION_FILE), whole=False)
    if args.resume != "auto":
        return open_state(Path(args.resume))
    return newest_state(Path(args.output_dir), args.output_name or "last") if args.output_dir else None


def whole_state(args: argparse.Namespace) -> SavedState:
    """The state on the Hub, all of it downloaded."""
    return open_state(_from_hub(args, "*"))


def _from_hub(args: argparse.Namespace, files: str) -> Path:
    return fetch_state(args.resume, Path(args.output_dir or ".") / "hub_states", args.huggingface_token, files)


def resume_problems(
    state: SavedState, args: argparse.Namespace, plan: RunPlan, undecided: Collection[str] = ()
) -> list[str]:
    """Why the run cannot go on from the state. undecided: options whose values are chosen later, so they are not compared."""
    problems = []
    if not args.resume_from_huggingface:  # whose other files are not here yet
        missing = [name for name in ALWAYS_THERE if not (state.folder / name).is_file()]
        problems += [f"--resume {state.folder}: {name} is missing. Resume from another state." for name in missing]
    now = options_that_shape(args, plan)
    saved = {name: value for name, value in state.options.items() if name not in undecided}
    differences = changed_options(saved, {name: value for name, value in now.items() if name not in undecided})
    if differences:
        problems.append(
            f"--resume {state.folder}: options that shape the run have changed: {'; '.join(differences)}. "
            "Give the old values, or start a new run with --network_weights."
        )
    if state.position.step >= plan.length.max_steps and given_start(args, plan.length) is None:
        problems.append(
            f"--resume {state.folder}: the state is at step {state.position.step}, and the run is to end at "
            f"{plan.length.max_steps}. Raise --max_train_steps or --max_train_epochs."
        )
    return problems
