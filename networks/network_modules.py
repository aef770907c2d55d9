"""`--network_module`: from its name to the module that makes the network."""

from __future__ import annotations

import importlib
from types import ModuleType

from library.common.errors import UserError

# the original's names, and where they lead for SD3
KNOWN = {
    "networks.lora": "networks.lora_sd3",
    "networks.lora_sd3": "networks.lora_sd3",
    "lycoris.kohya": "networks.lycoris_kohya",
    "networks.lycoris_kohya": "networks.lycoris_kohya",
}
FUNCTIONS = ("create_network", "create_network_from_weights", "check_network_args", "trains_t5xxl")


def network_module(name: str) -> ModuleType:
    """The module behind `--network_module`: one of KNOWN, or any importable module that has FUNCTIONS as networks.lora_sd3 has them.

    UserError where there is none, or it lacks a function.
    """
    target = KNOWN.get(name, name)
    advice = "Use networks.lora_sd3 for LoRA and DoRA, or lycoris.kohya for LoHa, LoKr and other LyCORIS algorithms."
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{target}.".startswith(f"{error.name}."):
            raise UserError(
                f"--network_module={name} needs the package {error.name}, which is not installed."
            ) from error
        raise UserError(f"--network_module={name}: there is no such module. {advice}") from None
    except ValueError:  # an empty name
        raise UserError(f'--network_module="{name}" names no module. {advice}') from None
    missing = [function for function in FUNCTIONS if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(
            f"--network_module={name} is no network module for SD3: it lacks {', '.join(missing)}. {advice}"
        )
    return module
