"""What is said of a run's files after losses that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from library.common.errors import UserError
from library.monitoring.nonfinite import NonfiniteWatch

BAD = (True, 1, ["a.png"], torch.tensor([500.0]))
GOOD = (False, 1, ["a.png"], torch.tensor([500.0]))


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([1.0, 0.9], "good"),
        ([1.0, math.nan], "finite"),
        ([1.0, 50.0], "finite"),
        ([], "finite"),
        ([math.inf], "finite"),
    ],
)
def test_files_are_good_only_after_a_sane_loss(losses: list[float], word: str):
    watch = NonfiniteWatch(2)
    for loss in losses:
        watch.observe_loss(loss)
    watch.check(*BAD)
    with pytest.raises(UserError, match=f"The last saved files are {word}"):
        watch.check(*BAD)


def test_a_run_fails_only_where_no_step_counted():
    watch = NonfiniteWatch(0)
    watch.check_end()  # a resumed run that had nothing to do
    watch.check(*BAD)
    with pytest.raises(UserError, match="Every step was skipped"):
        watch.check_end()
    watch.check(*GOOD)
    watch.check_end()
