"""The network to train, made from the options: on the models, and before that on models without weights, to find mistakes early."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from library.common.errors import UserError
from networks import lora_sd3, lycoris_kohya
from networks.arguments import arguments_of
from networks.diffusers_layout import diffusers_problems
from networks.network_modules import network_module

if TYPE_CHECKING:
    from networks.network import Network


@dataclass(frozen=True)
class NetworkSettings:
    """The options that a network is made from."""

    module: str = ""  # as --network_module names it
    args: tuple[str, ...] | None = None  # KEY=VALUE
    dim: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    weights: str | None = None  # the file whose weights it starts with
    dim_from_weights: bool = False
    save_format: str = "kohya"  # "kohya", "diffusers" or "both"


def make_network(
    settings: NetworkSettings, encoders: Sequence[nn.Module | None], denoiser: nn.Module | None
) -> Network:
    """Make the network of --network_module, filled from --network_weights, not yet attached.

    encoders: in the family's order, None for each that is not trained. denoiser: None when it is not trained. UserError where
    the options do not fit the models or each other, --save_format included.
    """
    module, arguments = network_module(settings.module), arguments_of(settings.args)
    if settings.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1.0, settings.weights, None, encoders, denoiser, None, False, settings.dropout, **arguments
        )
    else:
        network = module.create_network(
            1.0, settings.dim, settings.alpha, None, encoders, denoiser, settings.dropout, **arguments
        )
        if settings.weights:
            network.load_weights(settings.weights)
    if settings.save_format != "kohya":
        title = f"--save_format {settings.save_format}: this network"
        problems = diffusers_problems(_numbers_by_key(network), title)
        if problems:
            raise UserError(problems)
    return network


def validate_on_meta(
    settings: NetworkSettings, encoders: Sequence[nn.Module | None], denoiser: nn.Module | None
) -> int | None:
    """Make the network on models of the meta device; return how many numbers its file will have.

    UserError for what would be wrong only when the models have been loaded. None for networks that look at weights while
    they are made, which the meta device does not have: their size is not known yet.
    """
    module = network_module(settings.module)
    from_file = bool(settings.weights) and module is lycoris_kohya
    if module not in (lora_sd3, lycoris_kohya) or from_file:
        return None
    try:
        with quiet(logging.WARNING):
            network = make_network(settings, encoders, denoiser)
    except NotImplementedError:
        return None  # LyCORIS: full, DoRA
    return sum(_numbers_by_key(network).values())


def _numbers_by_key(network: Network) -> dict[str, int]:
    """How many numbers each tensor of the network's file has."""
    return {
        f"{name}.{suffix}": tensor.numel()
        for name, layer in network.layers.items()
        for suffix, tensor in layer.export_state().items()
    }


@contextmanager
def quiet(level: int) -> Iterator[None]:
    """Log nothing up to `level`: making a network is logged when it is made for good."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)
