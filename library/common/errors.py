"""The one way to report a mistake of the user: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """One or more problems that the user can mend.

    `main()` prints them without a traceback and exits with code 2. Every other exception is a bug of ours.
    Each problem is one sentence or two that name the file, the key or the option, and the remedy.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.as_text())

    def as_text(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join(f"{number}. {problem}" for number, problem in enumerate(self.problems, 1))


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
