"""Position tables: crops are the right patches, scaled tables are DiT's, and a batch takes the table of its area."""

from __future__ import annotations

import math
import random

import pytest
import torch

from library.sd3.pos_embed import ScaledPosEmbed, crop_pos_embed, random_offset, sincos_table


def test_a_crop_is_centred_or_where_it_is_asked_for():
    table = torch.arange(36.0).reshape(1, 36, 1)
    assert crop_pos_embed(table, 2, 4).flatten().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    assert crop_pos_embed(table, 1, 2, (5, 4)).flatten().tolist() == [34, 35]
    with pytest.raises(ValueError, match="leaves the position table"):
        crop_pos_embed(table, 7, 2)


def test_random_offsets_reach_every_place_and_no_other():
    rng = random.Random(0)
    seen = {random_offset(5, 4, 3, rng) for _ in range(400)}
    assert seen == {(top, left) for top in range(2) for left in range(3)}


def test_an_unscaled_table_equals_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    side = 16
    theirs = get_2d_sincos_pos_embed(64, side, base_size=16, output_type="pt")
    torch.testing.assert_close(sincos_table(side, 64, side)[0], theirs.float(), rtol=1e-5, atol=1e-5)


def test_scaled_tables_follow_the_formula_and_the_area():
    scaled = ScaledPosEmbed([(512, 512), (1024, 1024)], hidden_size=32)
    assert scaled.sides == [32, 64]
    table = scaled.table_for(32, 32)
    assert table.shape == (1, 48 * 48, 32)
    first_x = math.sin(16 * (0 - (48 - 32) / 2) / 32)
    assert table[0, 0, 0].item() == pytest.approx(first_x, abs=1e-6)
    assert scaled.table_for(64, 64).shape == (1, 96 * 96, 32)
    assert scaled.table_for(50, 50).shape == (
        1,
        48 * 48 + (50 * 50 - 48 * 48),
        32,
    )  # below the midpoint, so 512's table, grown to 50
    assert scaled.table_for(51, 51).shape == (1, 96 * 96, 32)
