"""The state that a run resumes from: which one it is, and whether the run fits it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from library.saving.hub import fetch_state
from library.saving.state import POSITION_FILE, SavedState, changed_options, newest_state, open_state

ALWAYS_THERE = ("optimizer.pt", "scheduler.pt", "averages.pt")


@dataclass(frozen=True)
class ResumeSettings:
    """Where the state is looked for."""

    resume: str | None = None  # a folder, "auto", or a folder of a repository on the Hub
    from_hub: bool = False
    output_dir: str | None = None
    output_name: str | None = None
    token: str | None = field(default=None, repr=False)  # of the Hub
    leaves_no_trace: bool = False  # what is downloaded is read and removed


def state_to_resume(settings: ResumeSettings) -> SavedState | None:
    """What --resume means: a folder, with `auto` the newest whole state of this output name if there is one, or a state on the Hub.

    Of one on the Hub the position alone is downloaded; `whole_state` fetches the rest. UserError where there is none.
    """
    if not settings.resume:
        return None
    if settings.from_hub and settings.leaves_no_trace:
        with TemporaryDirectory() as folder:
            return open_state(fetch_state(settings.resume, Path(folder), settings.token, POSITION_FILE), whole=False)
    if settings.from_hub:
        return open_state(_from_hub(settings, POSITION_FILE), whole=False)
    if settings.resume != "auto":
        return open_state(Path(settings.resume))
    return newest_state(Path(settings.output_dir), settings.output_name or "last") if settings.output_dir else None


def whole_state(settings: ResumeSettings) -> SavedState:
    """The state on the Hub, all of it downloaded."""
    return open_state(_from_hub(settings, "*"))


def _from_hub(settings: ResumeSettings, files: str) -> Path:
    return fetch_state(settings.resume or "", Path(settings.output_dir or ".") / "hub_states", settings.token, files)


def resume_problems(
    state: SavedState,
    options: Mapping[str, object],
    max_steps: int | None,
    undecided: Collection[str] = (),
    is_whole: bool = True,
) -> list[str]:
    """Why the run cannot resume from the state.

    options: those that determine the weights, with their values, the seed and the dataset's fingerprint. max_steps: of the run;
    None where --initial_step or --initial_epoch puts the start elsewhere. undecided: options whose values are chosen later, so
    they are not compared. is_whole: False where only the position has been downloaded.
    """
    problems = []
    if is_whole:
        missing = [name for name in ALWAYS_THERE if not (state.folder / name).is_file()]
        problems += [f"--resume {state.folder}: {name} is missing. Resume from another state." for name in missing]
    saved = {name: value for name, value in state.options.items() if name not in undecided}
    differences = changed_options(saved, {name: value for name, value in options.items() if name not in undecided})
    if differences:
        problems.append(
            f"--resume {state.folder}: options that shape the run have changed: {'; '.join(differences)}. "
            "Give the old values, or start a new run with --network_weights."
        )
    if max_steps is not None and state.position.step > max_steps:
        problems.append(
            f"--resume {state.folder}: the state is at step {state.position.step}, and the run is to end at "
            f"{max_steps}. Raise --max_train_steps or --max_train_epochs."
        )
    return problems
