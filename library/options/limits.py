"""The range that each number must lie in, but for those of the dataset, timesteps, loss and schedule: their rooms check them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Limit:
    """low..high; an open end is not itself allowed."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def text(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g} or more"
        if self.high == math.inf:
            return low
        return f"{low} and {f'below {self.high:.10g}' if self.high_open else f'at most {self.high:.10g}'}"


_SHARE = Limit(0, 1)
_BELOW_ONE = Limit(0, 1, high_open=True)
_COUNT = Limit(1)
_FROM_ZERO = Limit(0)
_POSITIVE = Limit(0, low_open=True)
_SEED = Limit(0, 2**32 - 1)

LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        **dict.fromkeys(("pos_emb_random_crop_rate", "clip_l_dropout_rate"), _SHARE),
        **dict.fromkeys(("clip_g_dropout_rate", "t5_dropout_rate"), _SHARE),
        **dict.fromkeys(("validation_split", "network_dropout"), _BELOW_ONE),
        **dict.fromkeys(("vae_batch_size", "text_encoder_batch_size", "dataset_repeats"), _COUNT),
        **dict.fromkeys(("gradient_accumulation_steps", "max_train_steps", "max_train_epochs", "network_dim"), _COUNT),
        **dict.fromkeys(("save_n_epoch_ratio", "save_last_n_epochs", "save_last_n_steps"), _COUNT),
        **dict.fromkeys(("save_last_n_epochs_state", "save_last_n_steps_state", "max_validation_steps"), _COUNT),
        **dict.fromkeys(("text_cache_variants", "gradient_checkpointing_blocks", "max_nonfinite_steps"), _COUNT),
        **dict.fromkeys(("ddp_timeout", "initial_epoch"), _COUNT),
        **dict.fromkeys(("max_data_loader_n_workers", "initial_step"), _FROM_ZERO),
        **dict.fromkeys(("learning_rate", "unet_lr", "text_encoder_lr", "max_grad_norm"), _FROM_ZERO),
        **dict.fromkeys(("network_alpha", "prior_loss_weight", "blocks_to_swap"), _FROM_ZERO),
        **dict.fromkeys(("scale_weight_norms", "vram"), _POSITIVE),
        **dict.fromkeys(("seed", "validation_seed"), _SEED),
        "ema_decay": Limit(0, 1, low_open=True, high_open=True),
        "t5xxl_max_token_length": Limit(1, 512),
    }
)


def limit_problems(args: argparse.Namespace) -> list[str]:
    """One sentence for each option whose value, or one of whose values, is out of range."""
    problems = []
    for dest, limit in LIMITS.items():
        given = getattr(args, dest)
        values = given if isinstance(given, list) else [given]
        for value in values:
            if value is not None and value != "auto" and not limit.holds(value):
                problems.append(f"--{dest} must be {limit.text()}, but it is {value}.")
    return problems
