"""The network to train, made from the options: on the models, and before that on models without weights, to find mistakes early."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from library.common.errors import UserError
from networks import lora_sd3, lycoris_kohya
from networks.arguments import arguments_of
from networks.diffusers_layout import diffusers_problems
from networks.network_modules import network_module


def make_network(args: argparse.Namespace, encoders: Sequence[nn.Module | None], denoiser: nn.Module | None) -> Any:
    """The network of --network_module, filled from --network_weights, not yet attached.

    encoders: in the family's order, None for each that is not trained. denoiser: None when it is not trained. UserError where
    the options do not fit the models or each other, --save_format included.
    """
    module, arguments = network_module(args.network_module), arguments_of(args.network_args)
    if args.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1.0, args.network_weights, None, encoders, denoiser, neuron_dropout=args.network_dropout, **arguments
        )
    else:
        network = module.create_network(
            1.0, args.network_dim, args.network_alpha, None, encoders, denoiser, args.network_dropout, **arguments
        )
        if args.network_weights:
            network.load_weights(args.network_weights)
    if args.save_format != "kohya":
        problems = diffusers_problems(_numbers_by_key(network), f"--save_format {args.save_format}: this network")
        if problems:
            raise UserError(problems)
    return network


def rehearse_network(
    args: argparse.Namespace, encoders: Sequence[nn.Module | None], denoiser: nn.Module | None
) -> int | None:
    """Make the network on models of the meta device; how many numbers its file will have.

    UserError for what would be found wrong only when the models have been loaded. None for networks that look at weights while
    they are made, which the meta device does not have: nothing is known of them yet.
    """
    module = network_module(args.network_module)
    from_file = bool(args.network_weights) and module is lycoris_kohya
    if module not in (lora_sd3, lycoris_kohya) or from_file:
        return None
    try:
        with _quiet():
            network = make_network(args, encoders, denoiser)
    except NotImplementedError:
        return None  # LyCORIS: full, DoRA
    return sum(_numbers_by_key(network).values())


def _numbers_by_key(network: Any) -> dict[str, int]:
    """How many numbers each tensor of the network's file has."""
    return {
        f"{name}.{suffix}": tensor.numel()
        for name, layer in network.layers.items()
        for suffix, tensor in layer.export_state().items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Making a network is logged when it is made for good."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
