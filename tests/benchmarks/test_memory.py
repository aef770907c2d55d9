"""benchmarks/memory.py: the numbers for the released models are consistent."""

from __future__ import annotations

import json

import pytest

from benchmarks import memory


def test_savers_save_and_cards_hold_what_is_chosen_for_them(capsys: pytest.CaptureFixture[str]):
    memory.main(["--preset", "sd35m", "--vram", "1", "4", "24"])
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    plain, lean = rows["sd35m: no option"], rows["sd35m: --lean_activations"]
    assert lean["weights"] == plain["weights"] and lean["activations"] < 0.55 * plain["activations"]
    assert rows["sd35m: --gradient_checkpointing"]["activations"] < 0.25 * lean["activations"]
    assert rows["sd35m: the least"]["GiB"] < 2.5
    assert "sd35m: a card of 1 GiB" not in rows
    assert rows["sd35m: a card of 4 GiB"]["GiB"] <= 3.5
    assert rows["sd35m: a card of 24 GiB"] == {**plain, "what": "sd35m: a card of 24 GiB"}
