"""`--network_module`: from its name to the module that makes the network. Open this file first.

A network module has the four functions of `NetworkModule`; lora_sd3.py and lycoris_kohya.py are the two of this package. What
they make is a `Network` (network.py): `NetworkLayer`s by LoRA name (network_layer.py), of the kinds in lora.py, dora.py and lycoris.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from library.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from networks.network import Network

# sd-scripts' names, and the modules that they stand for with SD3
KNOWN = {
    "networks.lora": "networks.lora_sd3",
    "networks.lora_sd3": "networks.lora_sd3",
    "lycoris.kohya": "networks.lycoris_kohya",
    "networks.lycoris_kohya": "networks.lycoris_kohya",
}
FUNCTIONS = ("create_network", "create_network_from_weights", "check_network_args", "trains_t5xxl")


class NetworkModule(Protocol):
    """The functions of a network module, with sd-scripts' signatures."""

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoders: Sequence[nn.Module | None] | None,
        mmdit: nn.Module | None,
        neuron_dropout: float | None = None,
        **kwargs: object,
    ) -> Network:
        """A new network, not yet attached. kwargs: the values of `--network_args` by key. UserError lists what is wrong with them."""

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: nn.Module | None,
        text_encoders: Sequence[nn.Module | None] | None,
        mmdit: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        **kwargs: object,
    ) -> tuple[Network, Mapping[str, Tensor]]:
        """The network of a file (--dim_from_weights), filled and not yet attached, and the file's tensors in kohya's layout."""

    def check_network_args(
        self, args: Iterable[str] | None, depth: int | None = None, max_norm: float | None = None
    ) -> list[str]:
        """What is wrong with `--network_args`, a sentence each; needs no model.

        depth: the model's number of blocks; max_norm: --scale_weight_norms, if set.
        """

    def trains_t5xxl(self, args: Iterable[str] | None) -> bool:
        """Whether `--network_args` put adapters on T5-XXL."""


def network_module(name: str | None) -> NetworkModule:
    """The module behind `--network_module`: one of KNOWN, or any importable module that has FUNCTIONS as networks.lora_sd3 has them.

    UserError where there is none, or it lacks a function.
    """
    advice = "Use networks.lora_sd3 for LoRA and DoRA, or lycoris.kohya for LoHa, LoKr and other LyCORIS algorithms."
    if not name:
        raise UserError(f"--network_module is missing. {advice}")
    target = KNOWN.get(name, name)
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{target}.".startswith(f"{error.name}."):
            raise UserError(
                f"--network_module={name} needs the package {error.name}, which is not installed."
            ) from error
        raise UserError(f"--network_module={name}: there is no such module. {advice}") from None
    except (ValueError, TypeError):  # an empty name, a relative one
        raise UserError(f'--network_module="{name}" names no module. {advice}') from None
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything while it is imported
        raise UserError(f"--network_module={name} fails on import: {type(error).__name__}: {error}") from error
    missing = [function for function in FUNCTIONS if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(
            f"--network_module={name} is no network module for SD3: it lacks {', '.join(missing)}. {advice}"
        )
    return cast(NetworkModule, module)
