"""The one way to report a mistake of the user: what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
MAX_CHARACTERS = 2000
"""Of one problem as it is shown."""
MAX_PROBLEMS = 100
"""Problems that are shown at once."""

# Control characters but the newlines of our own lists, line separators, marks that turn the direction of writing, and surrogates
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """One or more problems that the user can mend.

    `main()` prints them without a traceback and exits with code 2. Every other exception is a bug of ours.
    Each problem is one sentence or two that name the file, the key or the option, and the remedy.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.as_text())

    def as_text(self) -> str:
        """The problems for a terminal: numbered, control characters escaped, long ones cut."""
        texts = [printable(problem) for problem in self.problems[:MAX_PROBLEMS]]
        if len(self.problems) == 1:
            return texts[0]
        lines = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
        if len(self.problems) > MAX_PROBLEMS:
            lines.append(f"… and {len(self.problems) - MAX_PROBLEMS:,} more problems.")
        return "\n".join(lines)


def printable(text: str) -> str:
    """Text that holds a user's words, safe for a terminal: control characters escaped, cut at MAX_CHARACTERS."""
    shown = _UNPRINTABLE.sub(_escaped, text[:MAX_CHARACTERS])
    left_out = len(text) - MAX_CHARACTERS
    return f"{shown}… ({left_out:,} characters left out)" if left_out > 0 else shown


def _escaped(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


class ReadError(UserError):
    """What a run works with is missing, has changed or cannot be read.

    Before training it is a UserError like any other. In training the run is saved and ends with `RunInterrupted`.
    """


class RunInterrupted(UserError):
    """Training ended before its time because of something outside of the options, and was saved. `main()` exits with code 1."""


class Problems:
    """Collects problems so that the user hears of all of them at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def add(self, problem: str) -> None:
        self.problems.append(problem)

    def collect(self, error: UserError) -> None:
        self.problems.extend(error.problems)

    def raise_if_any(self) -> None:
        if self.problems:
            raise UserError(self.problems)


def collect_errors(problems: list[str], call: Callable[[], T]) -> T | None:
    """Return what `call` returns; where it raises UserError, append its problems to `problems` and return None."""
    try:
        return call()
    except UserError as error:
        problems += error.problems
        return None
