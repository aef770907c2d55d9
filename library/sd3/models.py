"""Load the denoiser and the VAE of Stable Diffusion 3 onto a device, frozen. Open this file first.

A model is made on the meta device from its tensors' shapes and filled by one strict `load_state_dict(assign=True)`. In order:
checkpoint.py (which file holds what) -> this file -> mmdit.py (the denoiser), vae.py; and for text: tokenizers.py ->
text_encoders.py -> text_encoder_manager.py (loads and frees them) -> conditioning.py (what the denoiser is conditioned on).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from library.common.errors import UserError
from library.common.tensor_io import Part, load_tensors
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.vae import Vae, VaeConfig

Model = TypeVar("Model", bound=nn.Module)


def shapes_of(part: Part) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in part.tensors.items()}


def load_mmdit(part: Part, device: torch.device | str, dtype: torch.dtype | None, mmap: bool = True) -> MMDiT:
    """The frozen denoiser in `dtype` (None: as stored)."""
    model = empty_mmdit(part)
    return _filled(model, part, device, dtype, mmap)


def load_vae(part: Part, device: torch.device | str, dtype: torch.dtype | None, mmap: bool = True) -> Vae:
    """The frozen autoencoder in `dtype` (None: as stored)."""
    model = empty_vae(part)
    return _filled(model, part, device, dtype, mmap)


def check_against(model: nn.Module, part: Part) -> list[str]:
    """The differences between a model and a part's tensors, a sentence each; empty when they fit. Reads no tensor data."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    actual = shapes_of(part)
    problems = []
    missing, unexpected = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    wrong = [
        f"{key} is {actual[key]}, not {expected[key]}"
        for key in sorted(expected.keys() & actual.keys())
        if expected[key] != actual[key]
    ]
    for what, names in (("missing", missing), ("not known", unexpected), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{part.path}: tensors of the {part.name} {what}: {', '.join(names[:8])}{more}.")
    return problems


def mmdit_problems(part: Part) -> list[str]:
    """What keeps a part from being loaded as a denoiser, from its header."""
    return _problems(empty_mmdit, part)


def vae_problems(part: Part) -> list[str]:
    """What keeps a part from being loaded as a VAE, from its header."""
    return _problems(empty_vae, part)


def _problems(empty: Callable[[Part], nn.Module], part: Part) -> list[str]:
    try:
        return check_against(empty(part), part)
    except UserError as error:
        return error.problems


def empty_mmdit(part: Part) -> MMDiT:
    """The model on the meta device. UserError where the shapes tell of sizes that no MMDiT has."""
    config = MMDiTConfig.from_shapes(shapes_of(part))
    _raise_if(config.problems(shapes_of(part)), part)
    with torch.device("meta"):
        return MMDiT(config)


def empty_vae(part: Part) -> Vae:
    """The model on the meta device. UserError where the shapes tell of sizes that no VAE has."""
    config = VaeConfig.from_shapes(shapes_of(part))
    _raise_if(config.problems(), part)
    with torch.device("meta"):
        return Vae(config)


def _raise_if(problems: list[str], part: Part) -> None:
    if problems:
        raise UserError([f"{part.path}: {problem}" for problem in problems])


def _filled(model: Model, part: Part, device: torch.device | str, dtype: torch.dtype | None, mmap: bool) -> Model:
    problems = check_against(model, part)
    if problems:
        raise UserError(problems)
    model.load_state_dict(load_tensors(part, device, dtype, mmap), strict=True, assign=True)
    return model.requires_grad_(False).eval()
