"""Many trials: each file operation of each training once, in a random order, with random kills in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.faults.jobs import JOBS, Job
from tests.faults.trials import Harness, Outcome, Strike, random_strike

REAL_EVERY = 15
"""Each n-th trial starts Python anew, by `accelerate launch`; the others are forked from a process that has imported everything."""


@dataclass
class Summary:
    outcomes: list[Outcome] = field(default_factory=list)

    def table(self) -> str:
        rows = [("training", "trials", "kills", "wrong", "stuck", "left over")]
        names = list(dict.fromkeys(outcome.job.name for outcome in self.outcomes))
        for name in [*names, "total"]:
            of_job = [outcome for outcome in self.outcomes if name in (outcome.job.name, "total")]
            counts = (
                len(of_job),
                sum(outcome.kills for outcome in of_job),
                sum(bool(outcome.wrong) for outcome in of_job),
                sum(bool(outcome.stuck) for outcome in of_job),
                sum(bool(outcome.left_over) for outcome in of_job),
            )
            rows.append((name, *map(str, counts)))
        return "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)

    @property
    def kills(self) -> int:
        return sum(outcome.kills for outcome in self.outcomes)

    @property
    def faults(self) -> list[str]:
        return [str(outcome) for outcome in self.outcomes if outcome.faults]


def run_campaign(
    harness: Harness,
    seed: int,
    seconds: float,
    jobs: tuple[Job, ...] = JOBS,
    on_trial: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Run trials until the time is up; one that has begun ends."""
    generator, summary = random.Random(seed), Summary()
    end = time.monotonic() + seconds
    for number, (job, strike) in enumerate(_strikes(harness, generator, jobs), start=1):
        if time.monotonic() > end:
            break
        _, unbroken = harness.reference(job)
        strikes = [strike]
        while len(strikes) < 8 and generator.random() < 0.8:
            strikes.append(random_strike(generator, job, unbroken, seconds=4.0 + 2.0 * job.processes))
        real = number % REAL_EVERY == 0
        summary.outcomes.append(harness.trial(job, strikes, real, again=generator.random() < 0.2))
        on_trial(summary)
    return summary


def _strikes(harness: Harness, generator: random.Random, jobs: tuple[Job, ...]) -> Iterator[tuple[Job, Strike]]:
    """First strikes: by turns of each training, at each of its operations once; then at random."""
    waiting: dict[Job, list[Strike]] = {}
    while True:
        for job in jobs:
            _, unbroken = harness.reference(job)
            if job not in waiting:
                counts = enumerate(unbroken.operations)
                waiting[job] = [Strike("all", n, rank) for rank, count in counts for n in range(1, count + 1)]
                generator.shuffle(waiting[job])
            yield job, waiting[job].pop() if waiting[job] else random_strike(generator, job, unbroken, 6.0)
