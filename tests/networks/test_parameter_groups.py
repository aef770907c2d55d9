"""Each part is trained at its own rate, and only the parts that are meant."""

from __future__ import annotations

import pytest
from torch import nn

from library.common.errors import UserError
from networks.parameter_groups import LearningRates, LoraPlus, parameter_groups


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, (1e-4, 1e-4, 1e-4)),
        ([], (1e-4, 1e-4, 1e-4)),
        ([1e-5], (1e-5, 1e-5, 1e-5)),
        ([1e-5, 2e-5], (1e-5, 2e-5, 2e-5)),
        ([1e-5, 2e-5, 3e-5], (1e-5, 2e-5, 3e-5)),
        ([0.0, 2e-5], (0.0, 2e-5, 2e-5)),
    ],
)
def test_one_to_three_text_encoder_rates(values, expected):
    rates = LearningRates.from_options(1e-4, None, values, train_t5xxl=True)
    assert rates.text_encoders == expected and rates.unet == 1e-4
    assert rates.trained_text_encoders == tuple(rate > 0 for rate in expected)


def test_t5_is_trained_only_when_asked():
    assert LearningRates.from_options(1e-4).trained_text_encoders == (True, True, False)


def test_unet_only_and_text_encoder_only():
    assert LearningRates.from_options(1e-4, train_unet_only=True).trained_text_encoders == (False, False, False)
    assert LearningRates.from_options(1e-4, 2e-4, train_text_encoder_only=True).unet == 0.0
    assert LearningRates.from_options(1e-4, 0.0).unet == 0.0


def test_wrong_rates_are_all_named():
    with pytest.raises(UserError) as error:
        LearningRates.from_options(-1.0, None, [1, 2, 3, 4], train_unet_only=True, train_text_encoder_only=True)
    assert len(error.value.problems) == 3


def layers() -> dict[str, nn.Module]:
    def layer() -> nn.Module:
        return nn.ModuleDict({"lora_down": nn.Linear(2, 1, bias=False), "lora_up": nn.Linear(1, 2, bias=False)})

    names = ["lora_unet_a", "lora_te2_b", "lora_te1_c", "lora_unet_d"]
    return {name: layer() for name in names}


def test_groups_with_rate_zero_are_left_out():
    rates = LearningRates(unet=1e-4, text_encoders=(0.0, 2e-5, 0.0))
    groups = parameter_groups(layers(), rates, LoraPlus())
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("textencoder 2", 2e-5, 2),
        ("unet", 1e-4, 4),
    ]


def test_a_parts_own_ratio_wins_over_the_general_one():
    plus = LoraPlus.from_ratios(4.0, 16.0, None)
    groups = parameter_groups(layers(), LearningRates(1.0, (1.0, 1.0, 0.0)), plus)
    assert {group["name"]: group["lr"] for group in groups} == {
        "textencoder 1": 1.0,
        "textencoder 1 plus": 4.0,
        "textencoder 2": 1.0,
        "textencoder 2 plus": 4.0,
        "unet": 1.0,
        "unet plus": 16.0,
    }
    only_unet = parameter_groups(layers(), LearningRates(1.0, (1.0, 0.0, 0.0)), LoraPlus.from_ratios(None, 2.0, None))
    assert [group["name"] for group in only_unet] == ["textencoder 1", "unet", "unet plus"]


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="Nothing would be trained"):
        parameter_groups(layers(), LearningRates(0.0, (0.0, 0.0, 0.0)), LoraPlus())
