"""Which layers of SD3 get a LoRA, of which rank, under which name.

MMDiT: the Linears of each half of each joint block; its embedders and final layer when `emb_dims` says so. CLIP-L, CLIP-G:
attention and MLP. T5: the same, when `train_t5xxl` says so. A layer's LoRA name is the part's prefix and the layer's path with
dots as underscores, which is what clients look for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from library.common.errors import UserError
from networks.dora import DoRALayer
from networks.lora import LayerSettings, LoRALayer
from networks.lora_arguments import LoraSettings, check_network_args, read_settings, trains_t5xxl
from networks.lora_file import layers_of_file
from networks.network import Network, make_network
from networks.network_layer import BaseLayer, is_target
from networks.parameter_groups import LoraPlus
from networks.weight_files import listed

__all__ = [
    "check_network_args",
    "create_network",
    "create_network_from_weights",
    "find_targets",
    "layers_by_name",
    "trains_t5xxl",
]

logger = logging.getLogger(__name__)

UNET_PREFIX = "lora_unet_"
TEXT_ENCODER_PREFIXES = ("lora_te1_", "lora_te2_", "lora_te3_")  # CLIP-L, CLIP-G, T5-XXL
# settings that a file decides under --dim_from_weights
DECIDED_BY_FILE = (
    "context_attn_dim",
    "context_mlp_dim",
    "context_mod_dim",
    "x_attn_dim",
    "x_mlp_dim",
    "x_mod_dim",
    "emb_dims",
    "conv_dim",
    "conv_alpha",
    "train_block_indices",
    "split_qkv",
    "use_dora",
    "use_rslora",
    "init",
)

BLOCK_LAYER = re.compile(r"joint_blocks\.(\d+)\.(context|x)_block\.(attn|attn2|mlp|adaLN_modulation)\.")
TEXT_LAYER = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])"  # CLIP
    r"|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)"  # T5
)
# the layers that each number of emb_dims is for, in its order
EMBEDDER_LAYERS = (
    ("context_embedder",),
    ("t_embedder.mlp.0", "t_embedder.mlp.2"),
    ("x_embedder.proj",),
    ("y_embedder.mlp.0", "y_embedder.mlp.2"),
    ("final_layer.adaLN_modulation.1",),
    ("final_layer.linear",),
)


@dataclass(frozen=True)
class Target:
    name: str  # of the LoRA
    layer: BaseLayer
    settings: LayerSettings


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
    """A new LoRA, not yet attached.

    text_encoders: CLIP-L, CLIP-G, T5-XXL, None for each that is not trained or not loaded; mmdit: None when not trained.
    network_dim None is rank 4; network_alpha None or 0 is the rank. kwargs: the texts of `--network_args` by key. vae is not
    used (network modules share this signature). UserError lists all that is wrong with the arguments.
    """
    depth = None if mmdit is None else _depth(mmdit)
    settings = read_settings(kwargs, network_dim, network_alpha, neuron_dropout, depth)
    if settings.conv_dim is not None and not (settings.emb_dims and settings.emb_dims[2]):
        logger.warning(
            "conv_dim is for x_embedder, the one convolution of SD3: without a rank for it in emb_dims it does nothing."
        )
    targets = list(find_targets(text_encoders or [], mmdit, settings))
    return _build(targets, settings, multiplier)


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
    """The LoRA of a file (--dim_from_weights), filled with its weights: its layers, ranks, alphas and DoRA; not yet attached.

    Of kwargs (`--network_args`) those about dropout, LoRA+ and the table count; UserError for those that the file decides,
    for a layer that the model lacks and for shapes that don't fit. for_inference leaves out every dropout.
    """
    settings = read_settings(kwargs, neuron_dropout=0.0 if for_inference else neuron_dropout)
    refused = [key for key in DECIDED_BY_FILE if key in kwargs]
    if refused:
        raise UserError(
            f"--dim_from_weights takes {', '.join(refused)} from {file or 'the given weights'}: leave out one or the other."
        )
    if for_inference:
        settings = replace(settings, rank_dropout=0.0, module_dropout=0.0)
    available = layers_by_name(text_encoders or [], mmdit)
    from_file = layers_of_file(file, weights_sd, available)
    tensors_by_name, where = from_file.layers, from_file.where
    no_lora = [name for name, layer in tensors_by_name.items() if "lora_down.weight" not in layer]
    if no_lora:
        raise UserError(
            f"{where} is no plain LoRA: {listed(no_lora)} lack lora_down. LyCORIS files go with --network_module=lycoris.kohya."
        )
    targets = [
        Target(name, layer, _layer_settings(settings, rank=tensors_by_name[name]["lora_down.weight"].shape[0]))
        for name, layer in available.items()
        if name in tensors_by_name
    ]
    dora = {name for name, layer in tensors_by_name.items() if "dora_scale" in layer}
    network = _build(targets, settings, multiplier, dora)
    network.load_tensors(from_file.tensors_of_layers, where)
    return network, from_file.tensors


def layers_by_name(text_encoders: Sequence[nn.Module | None], mmdit: nn.Module | None) -> dict[str, BaseLayer]:
    """Every layer that a LoRA file may name, embedders and final layer included, by LoRA name in the order of creation."""
    return {name: layer for name, _, layer in _candidates(text_encoders, mmdit)}


def find_targets(
    text_encoders: Sequence[nn.Module | None], mmdit: nn.Module | None, settings: LoraSettings
) -> Iterator[Target]:
    """The layers that get a LoRA under `settings`, text encoders first."""
    for name, path, layer in _candidates(text_encoders, mmdit):
        if name.startswith("lora_te3_") and not settings.train_t5xxl:
            continue
        rank = layer_rank(path, settings) if name.startswith(UNET_PREFIX) else settings.rank
        alpha = settings.alpha
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) and settings.conv_dim is not None:
            rank, alpha = (settings.conv_dim if rank else 0), settings.conv_alpha
        if rank:
            parts = 3 if settings.split_qkv and path.endswith(".qkv") else 1
            yield Target(name, layer, replace(_layer_settings(settings, rank), alpha=alpha, parts=parts))


def layer_rank(path: str, settings: LoraSettings) -> int:
    """The rank of an MMDiT layer's LoRA by the layer's path; 0: none."""
    match = BLOCK_LAYER.match(path)
    if match is None:
        ranks = settings.emb_dims or (0,) * len(EMBEDDER_LAYERS)
        return next((rank for rank, paths in zip(ranks, EMBEDDER_LAYERS) if path in paths), 0)
    block, half, part = match.groups()
    if settings.train_block_indices is not None and int(block) not in settings.train_block_indices:
        return 0
    kind = {"attn": "attn", "attn2": "attn", "mlp": "mlp", "adaLN_modulation": "mod"}[part]
    rank = getattr(settings, f"{half}_{kind}_dim")
    return settings.rank if rank is None else rank


def _candidates(
    text_encoders: Sequence[nn.Module | None], mmdit: nn.Module | None
) -> Iterator[tuple[str, str, BaseLayer]]:
    """(LoRA name, path, layer) of all that can have a LoRA."""
    for prefix, encoder in zip(TEXT_ENCODER_PREFIXES, text_encoders):
        for path, module in encoder.named_modules() if encoder is not None else ():
            if is_target(module) and TEXT_LAYER.fullmatch(path):
                yield lora_name(prefix, path), path, module
    embedders = {path for paths in EMBEDDER_LAYERS for path in paths}
    for path, module in mmdit.named_modules() if mmdit is not None else ():
        if is_target(module) and (BLOCK_LAYER.match(path) or path in embedders):
            yield lora_name(UNET_PREFIX, path), path, module


def lora_name(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


def _layer_settings(settings: LoraSettings, rank: int) -> LayerSettings:
    return LayerSettings(
        rank=rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        rank_dropout=settings.rank_dropout,
        module_dropout=settings.module_dropout,
        rslora=settings.use_rslora,
        init=settings.init,
    )


def _build(
    targets: Sequence[Target], settings: LoraSettings, multiplier: float, dora: set[str] | None = None
) -> Network:
    """dora: the names that are DoRA layers; None: all or none, as the settings say."""
    if not targets:
        raise UserError(
            "No layer gets a LoRA: every rank is 0, no block is chosen, or nothing is trained. Check --network_dim and --network_args."
        )
    layers: dict[str, LoRALayer] = {}
    for target in targets:
        kind = DoRALayer if (settings.use_dora if dora is None else target.name in dora) else LoRALayer
        layers[target.name] = kind(target.layer, target.settings)
    plus = LoraPlus.from_ratios(
        settings.loraplus_lr_ratio, settings.loraplus_unet_lr_ratio, settings.loraplus_text_encoder_lr_ratio
    )
    return make_network(layers, plus, multiplier, "LoRA", settings.verbose)


def first_block(names: Iterable[str]) -> int:
    """The first joint block that gets gradients from layers of these names; 0 where one is before all blocks."""
    matches = [re.search(r"joint_blocks_(\d+)_", name) for name in names]
    return min((int(match[1]) if match else 0 for match in matches), default=0)


def _depth(mmdit: nn.Module) -> int:
    return sum(1 for _ in mmdit.get_submodule("joint_blocks").children())
