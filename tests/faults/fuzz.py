"""Fuzz whatever a user brings: any bytes give a result or a UserError, quickly.

    python -m tests.faults.fuzz [--seconds 60] [--inputs N] [--seed N]

The seed changes daily and is printed: with it, a failure comes again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from library.common.errors import UserError
from tests.faults import fuzz_targets
from tests.faults.fuzz_targets import Target

SLOW = 10.0  # seconds that no input may take


def daily_seed() -> int:
    return int(datetime.now(timezone.utc).strftime("%Y%m%d"))


def run(seed: int, seconds: float, inputs: int | None = None) -> tuple[Counter[str], list[str]]:
    """Fuzz for so many seconds, or so many inputs. Returns the inputs of each target, and the failures."""
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    end = time.monotonic() + seconds
    try:
        with TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            targets = fuzz_targets.targets(Path(folder))
            number = 0
            while time.monotonic() < end if inputs is None else number < inputs:
                name, target = list(targets.items())[number % len(targets)]
                outcome, failure = _one(target, f"{seed} {number}")
                counts[f"{name} {outcome}"] += 1
                if failure:
                    failures.append(f"{name}, input {number} of seed {seed}: {failure}")
                number += 1
    finally:
        logging.disable(logging.NOTSET)
    return counts, failures


def _one(target: Target, seed: str) -> tuple[str, str]:
    """Whether one input was read, and what went wrong with it; "" where nothing did."""
    call: Callable[[], object] = target(random.Random(seed))
    started = time.perf_counter()
    try:
        call()
    except UserError as error:
        text = error.as_text()
        if not error.problems or len(text) > 300_000:
            return "failed", f"a message of {len(text)} characters for {len(error.problems)} problems"
        outcome = "refused"
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "failed", traceback.format_exc()
    else:
        outcome = "read"
    took = time.perf_counter() - started
    return outcome, f"it took {took:.1f} s" if took > SLOW else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--seed", type=int, default=daily_seed())
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    counts, failures = run(args.seed, args.seconds, args.inputs)
    print(json.dumps(counts, indent=1, sort_keys=True))
    for failure in failures[:200]:
        print(failure)
    print(f"{sum(counts.values())} inputs, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
