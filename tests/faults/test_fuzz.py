"""Whatever a user brings: a result or a UserError, for 20 seconds of a seed that changes daily."""

from __future__ import annotations

from library.common.errors import UserError
from tests.faults import fuzz

SECONDS = 20


def test_any_input_is_read_or_refused_with_a_message():
    seed = fuzz.daily_seed()
    print(f"seed {seed}")
    counts, failures = fuzz.run(seed, SECONDS)
    assert not failures, f"python -m tests.faults.fuzz --seed {seed} shows it again:\n" + "\n".join(failures[:5])
    assert sum(counts.values()) > 100


def test_the_fuzzer_sees_what_is_no_message():
    def target(error: BaseException):
        def fail() -> None:
            raise error

        return lambda rng: fail

    assert fuzz._one(target(UserError("x")), "1") == ("refused", "")
    for error in (ValueError("x"), SystemExit(1), RecursionError(), UserError([])):
        assert fuzz._one(target(error), "1")[0] == "failed"
