"""`python -m tests.faults --minutes 30`: kill trainings for so long, and say whether any was harmed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.end_to_end.conftest import make_workshop
from tests.faults.campaign import Summary, run_campaign
from tests.faults.jobs import JOBS, write_prompts
from tests.faults.trials import Harness


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the kills (default: the time)")
    parser.add_argument("--only", help="trainings whose names contain this")
    args = parser.parse_args()
    jobs = tuple(job for job in JOBS if not args.only or args.only in job.name)
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    workshop = make_workshop(folder)
    write_prompts(workshop)
    print(f"seed {args.seed}, folder {folder}", flush=True)

    def report(summary: Summary) -> None:
        last = summary.outcomes[-1]
        if last.faults:
            print(last, flush=True)
        if len(summary.outcomes) % 5 == 0:
            print(f"\n{summary.table()}\n", flush=True)

    summary = run_campaign(Harness(workshop, folder), args.seed, 60 * args.minutes, jobs, report)
    print(f"\n{summary.table()}\nseed {args.seed}; trials with faults are in {folder}")
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
