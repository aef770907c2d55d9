"""`--network_module=lycoris.kohya`: LyCORIS's algorithms on SD3, under the names that ComfyUI reads.

LyCORIS (Yeh et al. 2024, "Navigating Text-To-Image Customization") finds the layers and makes their parameters; the network
around them is networks.network.Network, so training, saving, loading and merging are the same as for a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from networks.lora_arguments import MAX_RANK, trains_t5xxl
from networks.lora_file import layers_of_file
from networks.lora_sd3 import layers_by_name
from networks.lycoris import FACTORED_MODULES, ROTATIONS, LycorisLayer
from networks.lycoris_arguments import FACTORED, LycorisSettings, check_network_args, read_settings
from networks.network import Network, make_network
from networks.network_layer import is_target, plain_weight
from networks.parameter_groups import LoraPlus

__all__ = ["check_network_args", "create_network", "create_network_from_weights", "trains_t5xxl"]

SUPPORTED = (*FACTORED_MODULES, *ROTATIONS, "full")
# settings that a file leaves open under --dim_from_weights
OPEN_WITH_FILE = (
    "module_dropout",
    "train_t5xxl",
    "verbose",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
    "algo",
)
# a whole preset: LyCORIS keeps the last one's values for whatever a new one leaves out
EMPTY_PRESET: Mapping[str, object] = {
    "enable_conv": True,
    "unet_target_module": [],
    "unet_target_name": [],
    "text_encoder_target_module": [],
    "text_encoder_target_name": [],
    "module_algo_map": {},
    "name_algo_map": {},
    "use_fnmatch": False,
    "exclude_name": [],
}


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: Sequence[nn.Module | None] | None,
    mmdit: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> Network:
    """A new LyCORIS network, not yet attached; arguments as those of networks.lora_sd3.create_network.

    Without a preset its layers are those of networks.lora_sd3. UserError where LyCORIS is not installed, an argument is wrong
    or no layer is found.
    """
    settings = read_settings(kwargs, network_dim, network_alpha, neuron_dropout)
    inners = _make_inners(settings, list(text_encoders or []), mmdit)
    layers = {inner.lora_name: LycorisLayer(inner, settings.bypass, settings.module_dropout) for inner in inners}
    return _network(layers, settings, multiplier)


def create_network_from_weights(
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
    """The network of a LyCORIS file (--dim_from_weights), filled with its weights; not yet attached.

    Of kwargs module_dropout, LoRA+ and the table count; UserError for those that the file decides.
    """
    refused = [key for key in kwargs if key not in OPEN_WITH_FILE] + ["--network_dropout"] * bool(neuron_dropout)
    if refused:
        raise UserError(
            f"--dim_from_weights with LyCORIS does not go with {', '.join(refused)}: leave one of them out."
        )
    settings = read_settings(kwargs)
    available = layers_by_name(text_encoders or [], mmdit)
    from_file = layers_of_file(file, weights_sd, available)
    where = from_file.where
    layers = {}
    for name, layer in available.items():
        if name in from_file.layers:
            inner = _inner_from_file(name, layer, from_file.layers[name], where)
            layers[name] = LycorisLayer(inner, True, 0.0 if for_inference else settings.module_dropout)
    network = _network(layers, settings, multiplier)
    network.load_tensors(from_file.tensors_of_layers, where)
    return network, from_file.tensors


def _lycoris() -> ModuleType:
    try:
        import lycoris.functional
        import lycoris.kohya
        import lycoris.modules
    except ImportError:
        raise UserError("--network_module=lycoris.kohya needs LyCORIS: pip install lycoris-lora==4.1.3") from None
    module: ModuleType = lycoris
    return module


def _make_inners(
    settings: LycorisSettings, text_encoders: list[nn.Module | None], mmdit: nn.Module | None
) -> list[Any]:
    """LyCORIS's modules for the layers that the preset chooses, text encoders first."""
    lycoris = _lycoris()
    models = [*text_encoders, mmdit]
    if not settings.bypass and any(map(_is_quantized, models)):
        how = "dora_wd or bypass_mode=False" if settings.algo in FACTORED else f"algo={settings.algo}"
        raise UserError(f"LyCORIS with {how} rebuilds weights and can't do that with a quantised base model.")
    kind = lycoris.kohya.LycorisNetworkKohya
    kind.apply_preset(_preset(settings, lycoris))
    alpha = settings.alpha or settings.rank
    absent = nn.Module  # keeps the encoders' numbers: lora_te2_ is CLIP-G even without CLIP-L

    def made_with(rank: int) -> list[Any]:
        made = kind(
            [encoder or absent() for encoder in text_encoders],
            mmdit or absent(),
            lora_dim=rank,
            alpha=alpha,
            conv_lora_dim=settings.rank if settings.conv_dim is None else settings.conv_dim,
            conv_alpha=alpha if settings.conv_alpha is None else settings.conv_alpha,
            dropout=settings.dropout,
            rank_dropout=settings.rank_dropout,
            use_tucker=settings.use_tucker,
            network_module=settings.algo,
            bypass_mode=settings.bypass,
            warn_on_unmatched=False,
            **settings.options,
        )
        return [*made.text_encoder_loras, *made.unet_loras]

    try:
        inners = made_with(settings.rank)
    except ValueError as error:
        if settings.algo == "boft":
            with torch.device("meta"), suppress(ValueError):
                check_rotation_rank(settings.algo, settings.rank, [inner.dim for inner in made_with(MAX_RANK)])
        raise UserError(
            f"LyCORIS can't make algo={settings.algo} at rank {settings.rank} for this model: {error}"
        ) from error
    if settings.algo == "diag-oft":
        check_rotation_rank(settings.algo, settings.rank, [inner.dim for inner in inners])
    strange = sorted({inner.name for inner in inners} - set(SUPPORTED))
    if strange:
        raise UserError(f"The preset {settings.preset} asks for {', '.join(strange)}, which is not supported here.")
    return inners


def check_rotation_rank(algo: str, rank: int, widths: Iterable[int]) -> None:
    """UserError with the smallest larger rank that works where algo=boft or diag-oft can't train layers of these output widths at `rank`.

    BOFT cuts a width into an even block of at most `rank` times a power of two. OFT cuts it into blocks of about `rank`; a
    block of one has no rotation and is never trained.
    """
    different = set(widths)
    if algo == "boft":
        smallest = max((2 * (width // (width & -width)) for width in different), default=0)
    else:
        factors = _lycoris().functional.factorization
        candidates = range(rank, max(different, default=0))
        smallest = next((r for r in candidates if all(min(factors(width, r)) > 1 for width in different)), rank)
    if smallest > rank:
        raise UserError(
            f"--network_dim {rank} is too small for algo={algo} on this model, whose layers are {min(different)} to "
            f"{max(different)} wide: use {smallest} or more."
        )


def _is_quantized(model: nn.Module | None) -> bool:
    layers = model.modules() if model is not None else ()
    return any(is_target(layer) and plain_weight(layer) is None for layer in layers)


def _preset(settings: LycorisSettings, lycoris: ModuleType) -> dict[str, Any]:
    """Which layers, in LyCORIS's form: by default those of networks.lora_sd3."""
    if settings.preset is None:
        chosen: dict[str, Any] = {
            "unet_target_module": ["SingleDiTBlock"],
            "text_encoder_target_module": ["CLIPAttention", "CLIPMLP"],
        }
    elif settings.preset in lycoris.kohya.PRESET:
        chosen = dict(lycoris.kohya.PRESET[settings.preset])
    else:
        chosen = lycoris.kohya.read_preset(settings.preset)
        if chosen is None:
            raise UserError(f"--network_args: the preset {settings.preset} can't be read; the lines above say why.")
    preset: dict[str, Any] = {**EMPTY_PRESET, **chosen}
    if settings.preset == "attn-only":
        preset["unet_target_module"] = [*preset["unet_target_module"], "Attention"]  # LyCORIS knows other models' names
    if settings.train_t5xxl and preset["text_encoder_target_module"]:
        t5 = "T5Attention" if settings.preset == "attn-only" else "T5Block"
        preset["text_encoder_target_module"] = [*preset["text_encoder_target_module"], t5]
    return preset


def _inner_from_file(name: str, layer: nn.Module, tensors: dict[str, Tensor], where: str) -> Any:
    """LyCORIS's module of the kind and sizes of a file's tensors."""
    modules = _lycoris().modules
    plain = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items() if suffix != "dora_scale"}
    kind, parameters = modules.get_module(plain, name)
    if kind is None or kind.name not in SUPPORTED:
        raise UserError(f"{where}: {name} is of no kind that is supported here ({', '.join(sorted(tensors))}).")
    if kind.name != "full" and "alpha" not in tensors:
        raise UserError(f"{where}: {name} lacks its alpha.")
    try:
        inner = modules.make_module(kind, parameters, name, layer)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{where}: {name} does not fit its layer: {error}") from error
    if "dora_scale" in tensors:
        inner.wd = True
        inner.dora_scale = nn.Parameter(torch.ones_like(tensors["dora_scale"], dtype=torch.float32))
    return inner


def _network(layers: dict[str, LycorisLayer], settings: LycorisSettings, multiplier: float) -> Network:
    if not layers:
        raise UserError(f"LyCORIS finds no layer to train (preset {settings.preset}).")
    ratios = (settings.loraplus_lr_ratio, settings.loraplus_unet_lr_ratio, settings.loraplus_text_encoder_lr_ratio)
    plus = LoraPlus.from_ratios(*ratios)
    return make_network(layers, plus, multiplier, f"LyCORIS {settings.algo}", settings.verbose)
