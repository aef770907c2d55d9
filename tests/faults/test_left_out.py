"""Whatever is left out of a command: a run that can be planned, or problems; never a traceback."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from library.common.errors import UserError
from tests.end_to_end.conftest import Workshop, workshop  # noqa: F401 (a fixture)
from tests.faults.inputs import plan_of

OPTIONS = {
    "save_every_n_epochs": 1,
    "sample_every_n_steps": 2,
    "network_dim": 4,
    "network_alpha": 1,
    "max_train_epochs": 1,
    "lr_scheduler": "cosine",
    "optimizer_type": "AdamW",
    "mixed_precision": "no",
}


def test_no_option_and_no_pair_of_options_is_missed_with_a_traceback(workshop: Workshop, tmp_path: Path):  # noqa: F811
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64", encoding="utf-8")
    words = workshop.arguments(tmp_path, sample_prompts=prompts, **OPTIONS)
    pairs = list(zip(words[::2], words[1::2]))
    for left_out in (*combinations(range(len(pairs)), 1), *combinations(range(8), 2)):
        kept = [word for number, pair in enumerate(pairs) if number not in left_out for word in pair]
        try:
            plan_of(kept)
        except UserError as error:
            assert error.problems


@pytest.mark.parametrize(
    "left_out", ["network_module", "pretrained_model_name_or_path", "dataset_config", "output_dir"]
)
def test_what_is_required_is_named_once(workshop: Workshop, tmp_path: Path, left_out: str):  # noqa: F811
    words = workshop.arguments(tmp_path)
    at = words.index(f"--{left_out}")
    with pytest.raises(UserError) as raised:
        plan_of([*words[:at], *words[at + 2 :]])
    (problem,) = raised.value.problems
    assert left_out in problem
