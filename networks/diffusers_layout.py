"""LoRA tensors from kohya's layout to that of diffusers (PEFT) and back, as pure functions; what the change does stays the same.

kohya: `lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight` [r, in], `.lora_up.weight` [out, r], `.alpha`; strength alpha / r.
diffusers: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, `.lora_B.weight`; strength 1, so lora_B takes in alpha / r.

Three things differ in more than their names. The fused q, k, v are three layers there: they share lora_A, lora_B is cut in three. The
last block's context and the final layer modulate by (shift, scale), there by (scale, shift). And the block-diagonal Up of a
LoRA with pairs of their own for q, k and v is taken apart. diffusers loads no LoRA of T5 and skips its tensors; ComfyUI loads
them under `text_encoders.t5xxl.transformer.`. diffusers has no form for DoRA with a magnitude per input or for LyCORIS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.text_files import FormatError, parse_json
from networks.diffusers_names import diffusers_paths, kohya_names
from networks.weight_files import group_by_layer, listed

THIRDS = 3  # q, k and v of a fused layer
SWAPPED = ("context_block_adaLN_modulation_1", "final_layer_adaLN_modulation_1")  # the first in the last block alone
PLAIN_SUFFIXES = {"lora_down.weight", "lora_up.weight", "alpha"}
# how a tensor's name may end in files of diffusers, PEFT and ComfyUI
ENDINGS = re.compile(
    r"\.(?:lora_(?P<peft>[AB])(?:\.\w+)?\.weight|lora\.(?P<old>down|up)\.weight"
    r"|lora_(?P<kohya>down|up)\.weight|(?P<alpha>alpha))$"
)
PEFT_PREFIX = "base_model.model."  # of names in files that PEFT itself writes
ADAPTER_CONFIG = "lora_adapter_metadata"  # diffusers keeps the PEFT configuration under this key of a file's metadata


@dataclass(frozen=True)
class Pair:
    """One low-rank change: scale * up @ down."""

    down: Tensor  # [r, in, ...]
    up: Tensor  # [out, r, ...]
    scale: float


# --- kohya -> diffusers ------------------------------------------------------------------------------------------------


def to_diffusers(tensors: Mapping[str, Tensor], where: str = "the LoRA") -> dict[str, Tensor]:
    """diffusers' names and tensors of a LoRA in kohya's layout. Tensors keep their dtype, but for a lora_B that it can't hold
    exactly once alpha / rank is in it: that one is float32. UserError lists what diffusers has no form for.
    """
    layers = group_by_layer(tensors, where)
    problems = diffusers_problems(tensors, where)
    if problems:
        raise UserError(problems)
    converted: dict[str, Tensor] = {}
    for name, layer in layers.items():
        pair = _kohya_pair(name, layer, where)
        paths = diffusers_paths(name)
        assert paths is not None
        for path, piece in zip(paths, _pieces(name, pair, len(paths))):
            converted[f"{path}.lora_A.weight"] = piece.down.clone()
            converted[f"{path}.lora_B.weight"] = scaled(piece.up, piece.scale)
    return converted


def diffusers_problems(keys: Iterable[str], where: str = "the LoRA") -> list[str]:
    """Why the tensors of these names have no form in diffusers' layout, a sentence each; empty when they can."""
    layers = group_by_layer(dict.fromkeys(keys), where)
    dora = [name for name, layer in layers.items() if "dora_scale" in layer]
    other = [name for name, layer in layers.items() if layer.keys() - PLAIN_SUFFIXES - {"dora_scale"}]
    unknown = [name for name in layers if diffusers_paths(name) is None]
    problems = []
    if dora:
        problems.append(f"{where} is a DoRA, which diffusers does not read: {listed(dora)}. Keep it in kohya's layout.")
    if other:
        problems.append(
            f"{where} is not a plain LoRA, and diffusers reads no other kind: {listed(other)}. Keep it in kohya's layout."
        )
    if unknown:
        problems.append(f"{where} has LoRAs for layers that SD3 does not have: {listed(unknown)}.")
    return problems


def unread_by_diffusers(keys: Iterable[str]) -> list[str]:
    """Names of LoRAs that convert but that diffusers passes over: those of T5."""
    return sorted({key.partition(".")[0] for key in keys if key.startswith("lora_te3_")})


def _kohya_pair(name: str, layer: Mapping[str, Tensor], where: str) -> Pair:
    if not {"lora_down.weight", "lora_up.weight"} <= layer.keys():
        raise UserError(f"{where}: {name} lacks its lora_down or lora_up. The file is damaged: make or copy it again.")
    down, up, alpha = layer["lora_down.weight"], layer["lora_up.weight"], layer.get("alpha")
    if not fit(down, up, alpha):
        raise UserError(f"{where}: {name} has lora_down {list(down.shape)} and lora_up {list(up.shape)}: no LoRA.")
    return Pair(down, up, 1.0 if alpha is None else float(alpha) / down.shape[0])


def fit(down: Tensor, up: Tensor, alpha: Tensor | None) -> bool:
    """Whether three tensors make one LoRA: down [r, in, ...], up [out, r, ...] and one number."""
    shaped = down.dim() >= 2 and up.dim() >= 2 and up.shape[1] == down.shape[0] > 0
    return shaped and (alpha is None or alpha.numel() == 1)


def _pieces(name: str, pair: Pair, count: int) -> list[Pair]:
    if count == 1:
        return [Pair(pair.down, _swapped(pair.up), pair.scale) if is_swapped(name, pair) else pair]
    ups = pair.up.chunk(count, dim=0)  # each [out / 3, r]
    rank, rest = divmod(pair.down.shape[0], count)
    if not rest and pair.up.any():
        blocks = [up[:, i * rank : (i + 1) * rank] for i, up in enumerate(ups)]
        if torch.equal(torch.block_diag(*blocks), pair.up):
            return [Pair(down, up, pair.scale) for down, up in zip(pair.down.chunk(count), blocks)]
    return [Pair(pair.down, up, pair.scale) for up in ups]


def is_swapped(name: str, pair: Pair) -> bool:
    """Whether the layer's output is (shift, scale): the final layer's, and the context's where nothing follows it."""
    return name.endswith(SWAPPED) and pair.up.shape[0] == 2 * pair.down.shape[1]


def _swapped(up: Tensor) -> Tensor:
    shift, scale = up.chunk(2, dim=0)
    return torch.cat([scale, shift])


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """tensor * scale, in the tensor's dtype where that holds it exactly and in float32 where not."""
    product = tensor.float() * scale
    same = product.to(tensor.dtype)
    return same.contiguous() if torch.equal(same.float(), product) else product.contiguous()


# --- diffusers -> kohya ------------------------------------------------------------------------------------------------


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether tensors' names are those of diffusers, PEFT or ComfyUI with dots, rather than kohya's."""
    known = list(keys)
    return bool(known) and not any(key.startswith(("lora_unet_", "lora_te")) for key in known)


def to_kohya(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, where: str = "the LoRA"
) -> dict[str, Tensor]:
    """A LoRA in diffusers' or PEFT's layout, in kohya's. metadata: the file's; diffusers writes the alphas there.

    q, k and v become one pair: of their rank where they share lora_A, else of the sum of their ranks with a block-diagonal Up.
    UserError lists the names that mean nothing here.
    """
    layers = _by_path(tensors, where)
    names = kohya_names(layers)
    pairs = _read_pairs(layers, tensors, _adapter_config(metadata, where), where)
    pairs_by_name: dict[str, dict[int, Pair]] = {}  # kohya name -> which third (see kohya_names) -> pair
    for path, pair in pairs.items():
        name, third = names[path]
        pairs_by_name.setdefault(name, {})[third] = pair
    converted: dict[str, Tensor] = {}
    for name, parts in pairs_by_name.items():
        is_fused = name.endswith("_qkv") and -1 not in parts
        pair = _fused(name, parts, where) if is_fused else next(iter(parts.values()))
        from_diffusers_names = -1 not in parts
        if from_diffusers_names and is_swapped(name, pair):
            pair = Pair(pair.down, _swapped(pair.up), pair.scale)
        converted[f"{name}.lora_down.weight"] = pair.down.contiguous()
        converted[f"{name}.lora_up.weight"] = pair.up.contiguous()
        converted[f"{name}.alpha"] = torch.tensor(pair.scale * pair.down.shape[0])
    return converted


def kohya_layers(keys: Iterable[str], where: str = "the LoRA") -> set[str]:
    """The kohya names of the layers that a file in diffusers' or PEFT's layout changes. UserError as `to_kohya`, for its names."""
    return {name for name, _ in kohya_names(_by_path(keys, where)).values()}


def _by_path(keys: Iterable[str], where: str) -> dict[str, dict[str, str]]:
    """Module path -> "down", "up" or "alpha" -> the tensor's name. UserError lists names that are none of a plain LoRA of SD3."""
    layers: dict[str, dict[str, str]] = {}
    strange = []
    for key in keys:
        ending = ENDINGS.search(key)
        if ending is None:
            strange.append(key)
            continue
        kind = {"A": "down", "B": "up"}.get(ending["peft"] or "") or ending["old"] or ending["kohya"] or "alpha"
        layers.setdefault(key[: ending.start()].removeprefix(PEFT_PREFIX), {})[kind] = key
    names = kohya_names(layers)
    unknown = [path for path in layers if path not in names]
    problems = []
    if strange:
        problems.append(
            f"{where}: what is no part of a plain LoRA in kohya's, diffusers' or PEFT's layout: {listed(strange)}."
        )
    if unknown:
        problems.append(f"{where}: what is no layer of SD3: {listed(unknown)}.")
    if problems:
        raise UserError(problems)
    return layers


def _read_pairs(
    layers: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], config: Mapping[str, object], where: str
) -> dict[str, Pair]:
    """Pairs by module path. UserError names the paths where none is whole."""
    pairs, broken = {}, []
    for path, keys in layers.items():
        layer = {kind: tensors[key] for kind, key in keys.items()}
        if not {"down", "up"} <= layer.keys() or not fit(layer["down"], layer["up"], layer.get("alpha")):
            broken.append(path)
            continue
        rank = layer["down"].shape[0]
        scale = float(layer["alpha"]) / rank if "alpha" in layer else _configured_scale(path, rank, config)
        pairs[path] = Pair(layer["down"], layer["up"], scale)
    if broken:
        raise UserError(f"{where}: their lora_A or lora_B is missing, or they do not fit each other: {listed(broken)}.")
    return pairs


def _adapter_config(metadata: Mapping[str, str] | None, where: str) -> dict[str, object]:
    text = (metadata or {}).get(ADAPTER_CONFIG)
    if text is None:
        return {}
    try:
        config = parse_json(text)
    except FormatError as error:
        raise UserError(f"{where}: the metadata's {ADAPTER_CONFIG} is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: the metadata's {ADAPTER_CONFIG} is not a table.")
    try:
        for key, value in config.items():
            if key.endswith("alpha_pattern"):
                for pattern, alpha in _patterns(value).items():
                    re.compile(pattern), _number(alpha)
            elif key.endswith("lora_alpha"):
                _number(value)
    except (TypeError, ValueError, re.error):
        raise UserError(f"{where}: the metadata's {ADAPTER_CONFIG} has alphas that are no numbers.") from None
    return config


def _configured_scale(path: str, rank: int, config: Mapping[str, object]) -> float:
    """alpha / rank as PEFT has it from its configuration: patterns match the end of a module's path.

    diffusers' names are behind the model's ("transformer.lora_alpha"), PEFT's own stand alone.
    """
    part, _, inner = path.partition(".")

    def setting(name: str) -> object:
        return config.get(f"{part}.{name}", config.get(name))

    alpha = setting("lora_alpha")
    if alpha is None:
        return 1.0
    for pattern, value in _patterns(setting("alpha_pattern")).items():
        if re.match(rf"(.*\.)?({pattern})$", inner):
            alpha = value
            break
    return _number(alpha) / (rank**0.5 if setting("use_rslora") else rank)


def _number(value: object) -> float:
    if not isinstance(value, int | float | str):
        raise TypeError(f"no number: {value!r}")
    return float(value)


def _patterns(value: object) -> dict[str, object]:
    if not isinstance(value or {}, dict):
        raise TypeError(f"no table: {value!r}")
    return dict(value) if isinstance(value, dict) else {}


def _fused(name: str, parts: Mapping[int, Pair], where: str) -> Pair:
    """One pair for q, k and v; one that is absent is not changed."""
    if len({(pair.up.shape[0], pair.down.shape[1:]) for pair in parts.values()}) > 1:
        raise UserError(f"{where}: q, k and v of {name} differ in size.")
    first = next(iter(parts.values()))
    scale = first.scale if len({pair.scale for pair in parts.values()}) == 1 else 1.0
    ups = {third: pair.up if scale == pair.scale else scaled(pair.up, pair.scale) for third, pair in parts.items()}
    if len({up.dtype for up in ups.values()}) > 1:
        ups = {third: up.float() for third, up in ups.items()}
    height, dtype = first.up.shape[0], next(iter(ups.values())).dtype
    if all(torch.equal(pair.down, first.down) for pair in parts.values()):
        empty = torch.zeros_like(first.up, dtype=dtype)
        return Pair(first.down, torch.cat([ups.get(third, empty) for third in range(THIRDS)]), scale)
    blocks = [ups.get(third, torch.zeros(height, 0, dtype=dtype)) for third in range(THIRDS)]
    down = torch.cat([parts[third].down for third in sorted(parts)])
    return Pair(down, torch.block_diag(*blocks), scale)
