"""Options that parse but whose feature is not part of this build yet: using one is an error that says so.

An option counts as used when its value differs from its default. An entry is taken out when its feature lands.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_DEEPSPEED = "DeepSpeed is not wired in"
_PLAN = "the memory plan is not wired in; choose --blocks_to_swap and --gradient_checkpointing yourself"

NOT_YET: Mapping[str, str] = MappingProxyType(
    {
        "deepspeed": _DEEPSPEED,
        "zero_stage": _DEEPSPEED,
        "offload_optimizer_device": _DEEPSPEED,
        "offload_optimizer_nvme_path": _DEEPSPEED,
        "offload_param_device": _DEEPSPEED,
        "offload_param_nvme_path": _DEEPSPEED,
        "zero3_init_flag": _DEEPSPEED,
        "zero3_save_16bit_model": _DEEPSPEED,
        "fp16_master_weights_and_gradients": _DEEPSPEED,
        "memory_plan": _PLAN,
        "vram": _PLAN,
    }
)
