"""Which parts are trained at which learning rate, and the optimizer's parameter groups, named for the log."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from torch import nn

from library.common.errors import UserError

logger = logging.getLogger(__name__)
Layer = TypeVar("Layer")

# LoRA name prefix of each part and its name in logs, in the order of groups
PARTS = {
    "lora_te1_": "textencoder 1",  # CLIP-L
    "lora_te2_": "textencoder 2",  # CLIP-G
    "lora_te3_": "textencoder 3",  # T5-XXL
    "lora_unet_": "unet",  # the MMDiT, by its old name
}


class ParameterGroup(TypedDict):
    """A parameter group of torch.optim, with the name that logs and trackers show."""

    params: list[nn.Parameter]
    lr: float
    name: str


@dataclass(frozen=True)
class LearningRates:
    """Rate of each part; 0 where a part is not trained."""

    unet: float
    text_encoders: tuple[float, float, float]  # CLIP-L, CLIP-G, T5-XXL

    @classmethod
    def from_options(
        cls,
        learning_rate: float,
        unet_lr: float | None = None,
        text_encoder_lr: Sequence[float] | None = None,
        train_unet_only: bool = False,
        train_text_encoder_only: bool = False,
        train_t5xxl: bool = False,
    ) -> LearningRates:
        """--text_encoder_lr has one value for all encoders, two for CLIP-L and the others, or three. UserError for other counts.

        The encoders' rates are 0 with `train_unet_only`, the MMDiT's with `train_text_encoder_only`, T5's without `train_t5xxl`.
        """
        encoder_rates = list(text_encoder_lr or [learning_rate])
        problems = []
        if len(encoder_rates) > 3:
            problems.append(
                f"--text_encoder_lr takes one to three values (CLIP-L, CLIP-G, T5-XXL), not {len(encoder_rates)}."
            )
        if train_unet_only and train_text_encoder_only:
            problems.append("--network_train_unet_only and --network_train_text_encoder_only exclude each other.")
        if any(not rate >= 0 for rate in (learning_rate, unet_lr or 0.0, *encoder_rates)):
            problems.append("Learning rates must not be negative.")
        if problems:
            raise UserError(problems)
        clip_l, clip_g, t5xxl = (encoder_rates + [encoder_rates[-1]] * 2)[:3]
        rates = (clip_l, clip_g, t5xxl if train_t5xxl else 0.0)
        return cls(
            unet=0.0 if train_text_encoder_only else learning_rate if unet_lr is None else unet_lr,
            text_encoders=(0.0, 0.0, 0.0) if train_unet_only else rates,
        )

    @property
    def trained_text_encoders(self) -> tuple[bool, bool, bool]:
        clip_l, clip_g, t5xxl = self.text_encoders
        return clip_l > 0, clip_g > 0, t5xxl > 0

    def only(self, parts: Iterable[str]) -> LearningRates:
        """The same rates, 0 for each part whose prefix is not among `parts`."""
        kept = set(parts)
        *encoders, unet = (rate if part in kept else 0.0 for part, rate in zip(PARTS, (*self.text_encoders, self.unet)))
        clip_l, clip_g, t5xxl = encoders
        return LearningRates(unet, (clip_l, clip_g, t5xxl))

    def of(self, prefix: str) -> float:
        """The rate of a part by its LoRA name prefix, a key of PARTS."""
        return dict(zip(PARTS, (*self.text_encoders, self.unet)))[prefix]


@dataclass(frozen=True)
class LoraPlus:
    """Factors of Up's learning rate (Hayou et al. 2024, "LoRA+", section 4); None: no group of its own."""

    unet: float | None = None
    text_encoders: float | None = None

    @classmethod
    def from_ratios(cls, general: float | None, unet: float | None, text_encoders: float | None) -> LoraPlus:
        """The ratio of a part wins over the general one."""
        return cls(general if unet is None else unet, general if text_encoders is None else text_encoders)

    def of(self, prefix: str) -> float | None:
        return self.unet if prefix == "lora_unet_" else self.text_encoders


def part_of(name: str) -> str | None:
    """The prefix in PARTS that a LoRA name begins with."""
    return next((prefix for prefix in PARTS if name.startswith(prefix)), None)


def parts_of(names: Iterable[str]) -> set[str]:
    return {prefix for name in names if (prefix := part_of(name)) is not None}


def without_absent_parts(
    layers: Mapping[str, Layer], present: set[str], where: object, why: str = "which this run does not train"
) -> dict[str, Layer]:
    """A file's layers by LoRA name without those of parts that are not `present`; a warning names these parts."""
    for prefix in sorted(parts_of(layers) - present):
        logger.warning("%s also has %s, %s: it is left out.", where, PARTS[prefix], why)
    return {name: layer for name, layer in layers.items() if part_of(name) in (None, *present)}


def parameter_groups(
    layers: Mapping[str, nn.Module], rates: LearningRates, plus: LoraPlus, plus_mark: str = "lora_up"
) -> list[ParameterGroup]:
    """[{"params": [...], "lr": rate, "name": "unet"}, …] in the order of PARTS, the LoRA+ group (" plus") after its part's.

    layers: modules by LoRA name. A parameter is of the LoRA+ group when its name has `plus_mark`. Parts at rate 0 are left
    out. UserError where nothing is left.
    """
    groups: list[ParameterGroup] = []
    for prefix, title in PARTS.items():
        rate, ratio = rates.of(prefix), plus.of(prefix)
        if rate == 0:
            continue
        ordinary: list[nn.Parameter] = []
        faster: list[nn.Parameter] = []
        for name, layer in layers.items():
            if name.startswith(prefix):
                for key, parameter in layer.named_parameters():
                    (faster if ratio is not None and plus_mark in key else ordinary).append(parameter)
        if ordinary:
            groups.append({"params": ordinary, "lr": rate, "name": title})
        if faster:
            groups.append({"params": faster, "lr": rate * (ratio or 1.0), "name": f"{title} plus"})
    if not groups:
        raise UserError("Nothing would be trained: every part has a learning rate of 0 or no layers chosen for it.")
    return groups
